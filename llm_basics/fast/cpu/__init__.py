"""Training and decoding on CPU: Numba kernels."""
