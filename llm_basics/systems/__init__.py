"""What runs beneath a model, written by hand: attention in tiles, and training on several ranks."""
