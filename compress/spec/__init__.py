"""Spec: the text forms that users write: recipes, schemes, selectors, states.

Imports errors.
"""
