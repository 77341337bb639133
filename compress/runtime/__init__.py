"""Runtime: loads a packed directory as a model that runs.

Imports errors, spec, freed_memory, numerics, checkpoint, importers, architecture, kernels, layerwise, hf.
"""
