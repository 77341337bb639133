"""Hub: pushes an artifact, after everything that could stand in its way has been checked.

Imports errors.
"""
