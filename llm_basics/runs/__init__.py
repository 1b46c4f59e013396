"""The run directory, checkpoints, loggers and signals."""
