"""Trained models packed natively, against the dense weights that they mean: logits, and greedy text. Prints a table when run."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import compress
from compress.checkpoint.reader import open_checkpoint
from compress.layerwise.model import build
from compress.runtime.artifact import backends
from support import SHARED, run

MODELS = ("stories260k", "tiny-llama-3m", "tiny-llama-8m", "tiny-mixtral-9m")
RECIPES = {
    "w4": "quantize.rtn(scheme=w4a16g32, ragged=channel)",
    "w4z": "quantize.rtn(scheme=w4a16g64-asym, ragged=channel)",
    "w3": "quantize.rtn(scheme=w3a16g32, ragged=channel)",
    "w2": "quantize.rtn(scheme=w2a16g16-asym, ragged=channel)",
    "nf4": "quantize.rtn(scheme=nf4g64, ragged=channel)",
    "fp4": "quantize.rtn(scheme=fp4g32, ragged=channel)",
    "fp8": "quantize.rtn(scheme=fp8)",
    "moqe2": "quantize.moqe(scheme=w2a16)",
}
CASES = [(model, name) for model in MODELS for name in RECIPES if name != "moqe2" or "mixtral" in model]
FAST = [("stories260k", "w3"), ("tiny-llama-3m", "w4"), ("tiny-mixtral-9m", "moqe2")]
TOKENS = 40
FP32 = 1e-6
"""How far logits in fp32 may be from the dense model's, as a share of their norm: what another order of the same sums changes, which is
2e-7 to 4e-7 here."""
BF16 = {"tiny-mixtral-9m": 5e-2}
"""How far logits in bf16 may be from the fp32 ones of the same weights, as a share of their norm: 1e-2, or more where a router,
whose inputs bf16 changes, may choose another expert for a token."""


class Found(NamedTuple):
    """What a packed model does."""

    fp32: float
    """The difference of logits in fp32, as a share of their norm."""
    bf16: float
    """The same in bf16."""
    alike: int
    """How many of the tokens of greedy text are the same from the first one on, in fp32."""
    bf16_alike: int
    """In bf16."""
    ran: str
    """How many weights which backend has run, in bf16."""
    seconds: float


def found(model: str, recipe: str, folder: Path) -> Found:
    """Packs a model and runs it, beside what it means."""
    start = time.perf_counter()
    run(SHARED / "models" / model, folder / "out", f"{RECIPES[recipe]} | pack(format=native)")
    exact: Any = build(open_checkpoint(folder / "out"), rounded=False)
    packed: dict[str, Any] = {dtype: compress.load(folder / "out", dtype) for dtype in ("float32", "bfloat16")}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, exact.config.vocab_size, (2, 48), generator=generator)
    with torch.no_grad():
        wanted = exact(input_ids=ids).logits
        logits = {dtype: one(input_ids=ids).logits.float() for dtype, one in packed.items()}

    def continued(one: Any) -> list[int]:
        tokens: torch.Tensor = one.generate(ids[:1, :8], max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        return tokens[0, 8:].tolist()

    meant = continued(exact)

    def alike(dtype: str) -> int:
        same = [a == b for a, b in zip(continued(packed[dtype]), meant, strict=True)]
        return [*same, False].index(False)

    return Found(
        *(float((logits[dtype] - wanted).norm() / wanted.norm()) for dtype in ("float32", "bfloat16")),
        alike("float32"), alike("bfloat16"),
        ", ".join(f"{count} {name}" for name, count in backends(packed["bfloat16"]).items()),
        time.perf_counter() - start,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "recipe"), [pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow]) for case in CASES]
)
def test_packed_models_do_what_their_weights_mean(model: str, recipe: str, tmp_path: Path) -> None:
    if not (SHARED / "models" / model).is_dir():
        pytest.skip("no trained models beside this checkout")
    one = found(model, recipe, tmp_path)
    assert one.fp32 <= FP32
    assert one.alike == TOKENS
    assert one.bf16 <= BF16.get(model, 1e-2)


def main(*chosen: str) -> None:
    """A line for each model and recipe, of those that are chosen."""
    print(f"{'model':16} {'recipe':6} {'fp32':>8} {'bf16':>8} {'text':>6} {'in bf16':>8} {'seconds':>8}  backends in bf16")
    for model, recipe in (case for case in CASES if not chosen or case[1] in chosen):
        with tempfile.TemporaryDirectory() as folder:
            one = found(model, recipe, Path(folder))
        text = f"{one.alike}/{TOKENS}"
        print(f"{model:16} {recipe:6} {one.fp32:8.1e} {one.bf16:8.1e} {text:>6} {one.bf16_alike:>5}/{TOKENS} {one.seconds:8.1f}  {one.ran}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
