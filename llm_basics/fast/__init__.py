"""Fast implementations under core's file names, and their kernels in text/, cpu/ and cuda/."""
