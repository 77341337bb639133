"""CUDA's runtime as far as kernels need it: the driver, NVRTC, and cubins."""
