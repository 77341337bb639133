"""compressed-tensors: the layout that transformers and vLLM read."""
