"""Formats and the kernels that run them: one folder per format."""
