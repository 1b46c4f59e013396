"""The `doctor` command: checks of this machine for training, and plans of runs on other hardware."""
