"""Executors: what lifts a pass from a weight or block to a checkpoint.

Imports errors, spec, threads, context, device, plots, numerics, checkpoint, corpus, architecture, contract, layerwise.
"""
