"""Passes that train a model on the predictions of a teacher."""
