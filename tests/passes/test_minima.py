"""Codes with minima, and of 5 and 6 bits, through every pass and format: they work, or are refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compress
from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.errors import RecipeError, UsageError
from compress.evaluate.verify import verify_bytes
from compress.layerwise.dense_view import DenseView
from compress.layerwise.model import build
from compress.pipeline.resolve import resolve
from compress.runtime import artifact
from compress.spec.recipe import parse_one_liner
from families import build as build_family
from support import dense_meaning, do, load, logits, ready_inputs, refused, run, tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


DATA = f"calibrate(data='{ready_inputs()}', samples=6)"


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss", "gpt2"])
def test_packed_natively_they_run_and_come_back(family: str, tmp_path: Path) -> None:
    kinds = "linear, embeddings, experts" if family in ("mixtral", "gpt_oss") else "linear, embeddings"
    quantized = f"quantize.rtn(scheme=w5a16g16-min, targets=[{kinds}], ragged=channel)"
    source = build_family(family, tmp_path)
    do(source, tmp_path / "codes", quantized)
    do(source, tmp_path / "out", f"{quantized} | pack(format=native)")
    meant = logits(build(open_checkpoint(tmp_path / "codes")))
    assert torch.equal(meant, logits(build(open_checkpoint(dense_meaning(tmp_path / "codes", tmp_path / "dense")))))
    model = compress.load(tmp_path / "out", "float32")
    assert set(artifact.backends(model)) <= {"simd", "reference"}
    unrounded = logits(build(open_checkpoint(tmp_path / "codes"), rounded=False))
    torch.testing.assert_close(logits(model), unrounded, rtol=1e-4, atol=1e-4)
    verify_bytes(open_checkpoint(tmp_path / "out"), Context())
    do(tmp_path / "out", tmp_path / "again", "unpack")
    first, second = (DenseView(open_checkpoint(tmp_path / name)) for name in ("codes", "again"))
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(first.dense(name), second.dense(name)) for name in first.weights)


def test_gptq_llm_mq_and_lorc_take_them(tiny: Path, tmp_path: Path) -> None:
    truth = logits(load(tiny, dtype=torch.float32))
    made = {
        "rtn": "quantize.rtn(scheme=w2a16g16-min)",
        "gptq": f"{DATA} | quantize.gptq(scheme=w2a16g16-min, outliers=0.01)",
        "lorc": "quantize.rtn(scheme=w2a16g16-min) | quantize.lorc(rank=8)",
        "llm_mq": f"{DATA} | quantize.llm_mq(schemes=[w2a16g16-min, w6a16g16-min], bits=4)",
    }
    lost = {}
    for name, recipe in made.items():
        done = do(tiny, tmp_path / name, recipe)
        assert all("-min" in weight.state for weight in done.manifest.weights.values())
        lost[name] = float((logits(build(open_checkpoint(tmp_path / name))) - truth).norm())
        verify_bytes(open_checkpoint(tmp_path / name), Context())
    assert max(lost["gptq"], lost["lorc"], lost["llm_mq"]) < lost["rtn"]


def test_training_moves_scales_and_says_that_minima_stay(tiny: Path, tmp_path: Path) -> None:
    recipe = f"{DATA} | quantize.rtn(scheme=w3a16g16-min) | distill.logits(batch=6, micro_batch=3)"
    notes = do(tiny, tmp_path / "out", recipe).manifest.notes
    assert any(note.what == "trained" and note.reason.startswith("scales (minima stay as they are)") for note in notes)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("quantize.rtn(scheme=w4a16g32-min) | pack", ("no format of it holds w4a16g32-min", "pack(format=native)")),
        ("quantize.rtn(scheme=w4a16g32-min) | pack(format=gptq)", ("has minima, which they hold only rounded", "-asym for -min")),
        ("quantize.rtn(scheme=w4a16g32-min) | pack(format=awq)", ("has minima, which they hold only rounded", "-asym for -min")),
        ("quantize.rtn(scheme=w5a16g32) | pack", ("no format of it holds w5a16g32", "2, 3, 4 or 8 bits")),
        ("quantize.rtn(scheme=w6a16g32) | pack(format=gptq)", ("its readers take 2, 3, 4 and 8 bits, not 6", "quantize to one of")),
        ("quantize.rtn(scheme=w6a16g32) | pack(format=awq)", ("the layout holds 4 bits, not 6", "pack as gptq")),
        ("prune.magnitude(sparsity=0.5) | quantize.rtn(scheme=w4a16g32-min)", ("no code of w4a16g32-min need mean zero", "-asym")),
        (f"{DATA} | quantize.gptq(scheme=w4a16g32-min, sparsity=0.5)", ("no code of w4a16g32-min need mean zero", "-asym")),
    ],
)  # fmt: skip
def test_what_cannot_hold_them_says_so_before_a_byte_moves(
    recipe: str, said: tuple[str, ...], tiny: Path, tmp_path: Path
) -> None:
    refused(tiny, tmp_path / "out", recipe, said)


def test_moqe_takes_symmetric_codes_alone() -> None:
    with pytest.raises(RecipeError, match="symmetric integers and a16, not w4a16-min"):
        resolve(parse_one_liner("quantize.moqe(scheme=w4a16-min)"))


def test_a_fused_backend_asked_by_name_says_why_not(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out", "quantize.rtn(scheme=w4a16g32-min) | pack(format=native)")
    with pytest.raises(UsageError, match="wants the values of code 8, which w4a16g32-min has only rounded"):
        compress.load(tmp_path / "out", backend="int4pack")
