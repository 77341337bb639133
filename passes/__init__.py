"""The passes, one file each.

Imports errors, spec, numerics, checkpoint, corpus, architecture, contract, kernels,
executors.
"""
