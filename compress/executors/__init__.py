"""Executors: run a pass over a whole checkpoint, by weight, block or model.

Imports errors, spec, threads, freed_memory, context, device, plots, numerics, checkpoint, corpus, architecture, contract,
layerwise.
"""
