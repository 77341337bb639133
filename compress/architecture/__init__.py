"""Architecture: what the tensors of a model are, and what reads what.

Imports errors, spec, numerics, checkpoint, importers.
"""
