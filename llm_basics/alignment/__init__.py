"""Post-training by hand: each file is one idea, written to be read."""
