"""The command line: one file per command, parsing and printing only.

Imports errors, spec, threads, context, device, plots, checkpoint, contract, kernels, layerwise, pipeline, runtime, hf,
evaluate, report, hub, demo.
"""
