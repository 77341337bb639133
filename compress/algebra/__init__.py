"""Pure tensor functions: grids, bit streams, and what later passes solve with."""
