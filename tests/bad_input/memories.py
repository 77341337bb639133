"""Plans that need more memory than the machine has."""

from __future__ import annotations

import json
from pathlib import Path

from bad_input.bench import Case
from compress.checkpoint.safetensors_header import write_header
from compress.spec.weight_state import TensorSpec

GPTQ = "-p 'calibrate(data={work}/data.jsonl, samples=2, length=16) | quantize.gptq(scheme=w4a16g32) | pack'"
HUGE = "-p 'quantize.rtn(scheme=w4a16g32) | pack'"
SMALL = 500_000_000


def huge(model: Path) -> None:
    """A model whose MLP alone is larger than this machine's memory; its file has a size, but takes no disk."""
    from compress.pipeline.memory_check import machine_bytes

    config = json.loads((model / "config.json").read_text())
    hidden, wide = 16384, machine_bytes() // 16384 // 64 * 64
    config.update(hidden_size=hidden, intermediate_size=wide, num_hidden_layers=1, vocab_size=64, tie_word_embeddings=True)
    config.update(num_attention_heads=128, num_key_value_heads=1, head_dim=128)
    (model / "config.json").write_text(json.dumps(config))
    block, out = "model.layers.0", (128 * 128, 128)
    shapes = {
        "model.embed_tokens": (64, hidden), "model.norm": (hidden,),
        **{f"{block}.self_attn.{name}_proj": (size, hidden) for name, size in zip("qkvo", (out[0], out[1], out[1], out[0]), strict=True)},
        **{f"{block}.mlp.{name}_proj": (wide, hidden) for name in ("gate", "up")}, f"{block}.mlp.down_proj": (hidden, wide),
        **{f"{block}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")},
    }  # fmt: skip
    specs = [TensorSpec(f"{name}.weight", "BF16", shape) for name, shape in shapes.items()]
    with open(model / "model.safetensors", "wb") as stream:
        stream.write(header := write_header(specs, {"format": "pt"}))
        stream.truncate(len(header) + sum(spec.nbytes for spec in specs))


def texts(model: Path) -> None:
    (model.parent / "data.jsonl").write_text("".join(json.dumps({"text": f"text {i} of many"}) + "\n" for i in range(99)))


PEAK, THERE, ANYWAY = "bytes of memory, its predicted peak", "bytes that this machine", "--allow-overcommit runs it anyway"
CASES = {
    "a checkpoint larger than this machine": Case(
        6, ("step 1: quantize.rtn", PEAK, THERE, "run it on fewer cores", ANYWAY), f"run {{model}} {{out}} {HUGE}", huge
    ),
    "the same by the command of a pass": Case(6, ("step 1: quantize.rtn", PEAK, ANYWAY), "quantize rtn {model} {out} --scheme w4a16g32", huge),
    "the same planned": Case(0, ("memory: does not fit: step 1: quantize.rtn needs", PEAK, THERE, ANYWAY), f"plan {{model}} {HUGE}", huge),
    "to pack what would fit as codes": Case(6, ("step 2: pack", "step 1: quantize.rtn", "2 problems"), f"run {{model}} {{out}} {HUGE}", huge),
    "a limit below the interpreter": Case(6, ("step 1: quantize.rtn", f"{SMALL:,} {THERE}"), there_bytes=SMALL),
    "a sweep": Case(6, ("step 2: quantize.gptq", f"{SMALL:,} {THERE}", "calibrate on fewer tokens", ANYWAY), f"run {{model}} {{out}} {GPTQ}", texts, "demo", there_bytes=SMALL),
    "training": Case(
        6, ("step 1: distill.logits", "lower micro_batch or length, or set recompute=true", ANYWAY),
        "distill logits {model} {out} --data {work}/data.jsonl --samples 2 --length 16", texts, "demo", there_bytes=SMALL,
    ),
    "errors as JSON": Case(6, ('"kind": "MachineError"', "its predicted peak"), "quantize rtn {model} {out} --scheme w4a16g32 --json", there_bytes=SMALL),
}  # fmt: skip
