"""The `doctor` command: is this machine fit for training, and what fits on another."""
