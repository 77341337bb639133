"""The parts of CUDA that kernels need: the driver, NVRTC, and cubins."""
