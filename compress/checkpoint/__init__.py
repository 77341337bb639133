"""Checkpoint: safetensors directories, read lazily and written shard by shard.

Imports errors, spec, threads, context, numerics.
"""
