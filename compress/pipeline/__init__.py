"""Pipeline: a recipe resolved, planned, and run from source to output.

Imports errors, spec, threads, freed_memory, context, device, checkpoint, corpus, architecture, contract, layerwise, executors.
"""
