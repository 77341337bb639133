"""C++ kernels for CPUs: sources, how they are built, found and called."""
