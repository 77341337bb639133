"""Formats and the kernels that run them: one folder per format.

Imports errors, spec, numerics, checkpoint, architecture, contract.
"""
