"""Generating text with trained models."""
