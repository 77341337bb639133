"""Contract: what passes and formats answer, and the plan of a step.

Imports errors, spec, numerics, checkpoint, corpus, architecture.
"""
