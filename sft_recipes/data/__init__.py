"""From files to the rows that the loss sees."""
