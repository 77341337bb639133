"""native: our own packed layout, one for every kernel, and its backends."""
