"""Passes that train a model on what another one says."""
