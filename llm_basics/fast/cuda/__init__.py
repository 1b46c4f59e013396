"""Training and decoding on GPU: Triton kernels and CUDA graphs."""
