"""From files to tokenized rows with a loss mask."""
