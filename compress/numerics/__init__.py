"""Numerics: pure tensor functions: grids, bit streams, solvers, codes.

Imports spec.
"""
