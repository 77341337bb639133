"""Spec: what a user writes: recipes, schemes, selectors, states of weights.

Imports errors.
"""
