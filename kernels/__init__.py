"""Formats and the kernels that run them: one folder per format.

Imports errors, spec, numerics, checkpoint, importers, architecture, contract.
"""
