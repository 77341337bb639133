"""Quantize a model in one call: 4 bits in groups of 64, packed for transformers and vLLM.

python examples/quantize.py MODEL OUT
"""

import sys

import compress

result = compress.run("quantize.rtn(scheme=w4a16g64, clip=mse) | pack", sys.argv[1], sys.argv[2])
print(result.manifest.coverage)
print(f"{result.plan.source_bytes:,} bytes became {result.plan.steps[-1].payload_bytes:,}")
