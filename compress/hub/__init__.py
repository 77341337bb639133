"""Hub: pushes an artifact, once all that could prevent it has been checked.

Imports errors, spec, context, checkpoint, contract, pipeline, evaluate, report.
"""
