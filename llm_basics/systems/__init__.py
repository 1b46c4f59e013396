"""Systems beneath a model, written by hand: attention in tiles, and distributed training."""
