"""Evaluate: perplexity and KL, differences, readers, verification, speed.

Imports errors, spec, threads, context, device, plots, numerics, checkpoint, importers, architecture, kernels, layerwise,
pipeline, runtime.
"""
