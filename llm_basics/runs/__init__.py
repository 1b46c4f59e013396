"""The run directory: the only interface between programs."""
