"""Numerics: pure tensor functions for grids, bit streams, solvers and codes.

Imports spec.
"""
