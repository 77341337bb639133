"""Formats and the kernels that execute them: one folder per format, `layout.py` in plain torch inside it."""
