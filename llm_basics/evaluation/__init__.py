"""Measuring models on text and on multiple-choice questions."""
