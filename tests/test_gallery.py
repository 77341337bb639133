"""The gallery: every installed recipe runs on a small model by the command of its first line, and its artifact is read again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.evaluate.verify import verify_bytes
from families import build
from forked import compress

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
_PLACEHOLDER = re.compile(r"--set (\S+)=TEXTS\.jsonl")
TRAINED = (
    "prune.sheared.layers=3", "prune.sheared.ffn=320", "prune.sheared.batch=4", "prune.sheared.micro_batch=4",
    "distill.logits.batch=4", "distill.logits.micro_batch=4",
)  # fmt: skip
SHORT = {
    "sheared_w4": ("prune.sheared.parameters=0.7M", "prune.sheared.multiple=16", "quantize.gptq.scheme=w4a16g32"),
    "width_w4": ("prune.width.parameters=0.7M", "prune.width.multiple=16", "quantize.gptq.scheme=w4a16g32"),
    "sheared_mq": (*TRAINED, "quantize.rtn.targets=[embeddings]"),
    "sheared_mq_ct": TRAINED,
    "awq_w4": ("quantize.smooth.scheme=w4a16g32-asym", "quantize.rtn.scheme=w4a16g32-asym"),
}
"""What fits a model of 1 M parameters."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n not in ("rtn_w4", "gptq_w3") else []) for n in RECIPES]
)
def test_a_recipe_runs_as_its_first_line_says(demo_model: Path, tmp_path: Path, name: str) -> None:
    first = (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith(f"# compress run MODEL OUT {name} ")
    model, text = demo_model, demo_model.parent / "text" / "calibration.jsonl"
    if name.startswith("moqe"):
        model = build("mixtral", tmp_path / "model")
    settings = [f"{option}={text}" for option in _PLACEHOLDER.findall(first)]
    for option in {setting.partition("=")[0].removesuffix(".data") for setting in settings}:
        settings += [f"{option}.samples=8", f"{option}.length=64"]
    settings += SHORT.get(name, ())
    done = compress("run", model, tmp_path / "out", name, *(word for setting in settings for word in ("--set", setting)))
    assert done.returncode == 0, done.stderr
    artifact = open_checkpoint(tmp_path / "out")
    found = verify_bytes(artifact, Context())
    assert found.named
    assert found.tensors > 0
