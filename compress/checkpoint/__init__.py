"""Checkpoint: safetensors directories, read lazily and written by shards.

Imports errors, spec, threads, context, numerics.
"""
