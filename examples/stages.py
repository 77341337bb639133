"""Prune, quantize, train back and pack, and measure what each stage costs.

python examples/stages.py MODEL OUT TEXTS.jsonl HELD_OUT.jsonl
"""

import sys
from pathlib import Path

import compress

model, out, texts, held_out = sys.argv[1:]
RECIPE = f"""
version: 1
passes:
- calibrate: {{data: ['{texts}'], samples: 16, length: 256}}
- prune.wanda: {{sparsity: 2:4}}
- quantize.gptq: {{scheme: w4a16g32, ragged: divide}}
- distill.logits: {{data: ['{texts}'], samples: 16, length: 256, batch: 4, lr: 0.002, scale_lr: 0.02}}
- pack: {{format: native}}
"""

result = compress.run(compress.parse_yaml(RECIPE), model, out)
source = compress.open_checkpoint(Path(model))
windows = compress.token_windows(Path(model), Path(held_out), 256, 2048)
# Each step stays beside OUT, as a checkpoint that can be measured by itself.
for step in sorted(Path(f"{out}.steps").iterdir()):
    if (step / "config.json").is_file() and "-calibrate-" not in step.name:
        found = compress.compare(source, compress.open_checkpoint(step), windows)
        print(f"{step.name.rpartition('-')[0]:<20} KL {found.kl.value:.4f} +- {found.kl.error:.4f}")
print(f"{result.plan.bits(result.plan.steps[-1]):.3f} bits per weight")
