"""From tokenized rows to weights: the program of every rank."""
