"""Passes that train a model on texts alone."""
