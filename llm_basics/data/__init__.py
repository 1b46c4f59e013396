"""Text to token files, conversations to examples."""
