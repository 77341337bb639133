"""awq: the gemm layout of AutoAWQ, four bits with true zero points."""
