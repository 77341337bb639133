"""Trained models at every width: packed, loaded by transformers, logits equal to the canonical meaning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.checkpoint.reader import open_checkpoint
from compress.evaluate.perplexity_kl import Estimate, compare
from compress.layerwise.eval_windows import token_windows
from compress.layerwise.model import build
from support import SHARED, dense_meaning, few, load, logits, run, step_of

pytest.importorskip("compressed_tensors")
MODELS = {"stories260k": 64, "tiny-llama-3m": 32, "tiny-llama-8m": 64, "tiny-mixtral-9m": 64}


@pytest.fixture(params=["embedded", *MODELS])
def model(request: pytest.FixtureRequest, demo_model: Path) -> tuple[Path, int]:
    if request.param == "embedded":
        return demo_model, 32
    path = SHARED / "models" / request.param
    if not path.is_dir():
        pytest.skip(f"{request.param} does not lie beside this checkout")
    return path, MODELS[request.param]


@pytest.mark.parametrize("bits", few([8, 4, 3, 2], 4, 3))
def test_packed_logits_are_the_canonical_ones(model: tuple[Path, int], bits: int, tmp_path: Path) -> None:
    source, group = model
    result = run(
        source, tmp_path / "out", f"quantize.rtn(scheme=w{bits}a16g{group}, ragged=divide) | pack(format=compressed-tensors)"
    )
    plan = result.plan
    assert plan.steps[-1].payload_bytes == open_checkpoint(tmp_path / "out").nbytes
    assert result.manifest.coverage["transformed"] == result.manifest.coverage["targeted"] > 0
    linears = [w for w in plan.weights if w.kind in ("linear", "expert")]
    assert len(linears) == result.manifest.coverage["transformed"], "every linear of the blocks is covered"
    packed = logits(load(tmp_path / "out"))
    canonical = logits(load(dense_meaning(step_of(tmp_path / "out", "quantize.rtn"), tmp_path / "dense")))
    assert torch.equal(packed, canonical)
    ours = logits(build(open_checkpoint(tmp_path / "out"), str(packed_dtype(source)).removeprefix("torch.")))
    assert torch.equal(ours, canonical)
    assert not torch.equal(packed, logits(load(source)))


def packed_dtype(source: Path) -> torch.dtype:
    return next(p for p in load(source).parameters() if p.dim() == 2).dtype


def test_fewer_bits_cost_more_and_the_search_helps(demo_model: Path, tmp_path: Path) -> None:
    """On trained weights KL grows as bits fall, and clip=mse is worth something at 2 bits."""
    windows = token_windows(demo_model, demo_model.parent / "text" / "evaluation.jsonl", 256, 4096)
    source = open_checkpoint(demo_model)

    def kl(recipe: str, name: str) -> float:
        run(demo_model, tmp_path / name, recipe)
        return compare(source, open_checkpoint(tmp_path / name), windows).kl.value

    found = [kl(f"quantize.rtn(scheme=w{bits}a16g32)", f"w{bits}") for bits in (8, 4, 3, 2)]
    assert found == sorted(found)
    assert found[0] < 1e-3 < found[1]
    assert kl("quantize.rtn(scheme=w2a16g32, clip=mse)", "searched") < found[3]


def test_perplexity_of_a_published_model() -> None:
    """The loader and the protocol give the perplexities that come with the models."""
    folder = SHARED / "models" / "tiny-llama-3m"
    if not folder.is_dir():
        pytest.skip("tiny-llama-3m does not lie beside this checkout")
    model = open_checkpoint(folder)
    for text, perplexity in (("wiki", 44.25), ("code", 30.88)):
        windows = token_windows(folder, SHARED / "data" / f"{text}.valid.jsonl", 256, 10_240)
        found = compare(model, model, windows)
        assert found.perplexity.value == pytest.approx(perplexity, abs=0.02)
        assert found.kl == found.kl_p99 == Estimate(0.0, 0.0)
        assert found.top1 == Estimate(1.0, 0.0)
