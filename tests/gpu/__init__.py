"""What needs a GPU: `make gpu` runs it and writes build/gpu.json and build/gpu.md.

COMPRESS_TEST_DEVICE=cpu rehearses it without one: the same tests of whatever backends take the weights there.
"""
