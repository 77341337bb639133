"""Architecture: what the tensors of a model are, and which weights read which activations.

Imports errors, spec, numerics, checkpoint, importers.
"""
