"""Options of the commands and their parsing."""
