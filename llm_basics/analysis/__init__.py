"""Plots, comparisons and sweeps of runs."""
