"""Evaluate: quality, tasks, knowledge, differences, verification, speed.

Imports errors, spec, freed_memory, context, device, plots, numerics, checkpoint, importers, corpus, architecture, kernels,
layerwise, pipeline, runtime.
"""
