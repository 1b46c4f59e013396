"""Tokenizer kernels: splitting, counting, merging, encoding."""
