"""Passes that set weights to zero, or take them out."""
