"""Architecture: what the tensors of a model are, and which read an activation.

Imports errors, spec, numerics, checkpoint, importers.
"""
