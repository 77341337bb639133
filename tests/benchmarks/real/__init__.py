"""Benchmark: every method on a real language model, as a user runs it; other tools beside them (make real)."""
