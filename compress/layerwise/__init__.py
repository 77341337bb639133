"""Layerwise: forward passes with one block in memory.

Imports errors, spec, threads, freed_memory, device, numerics, checkpoint, importers, corpus, architecture, contract, kernels.
"""
