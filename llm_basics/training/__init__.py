"""The training loop and everything around one step."""
