"""gptq: the layout of AutoGPTQ, version 1."""
