"""Architecture: roles of tensors in a model, and which activations they read.

Imports errors, spec, numerics, checkpoint, importers.
"""
