"""The K-quant benchmark: the recipe that follows a peer's file, its rows and page, and the wider model; without the peer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import kquants, llama_tools
from benchmarks.kquants import Case, cells, page, sizes, types_of
from benchmarks.real.rows import Protocol
from benchmarks.wide_llama import widen
from safetensors.torch import load_file

import compress
from compress import demo
from compress.errors import InputError, MachineError
from support import load, logits, run, tiny_llama

TEXT = Path(demo.__file__).parent / "text"
QUALITY = {name: {"value": 0.25, "error": 0.01} for name in ("kl", "perplexity", "top1")}


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_model: Path) -> Case:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    protocol = Protocol(demo_model, TEXT / "evaluation.jsonl", TEXT / "calibration.jsonl", 4, 32, 64, 32)
    return Case("demo", protocol, ("Q4_K_M",), tmp_path / "kquants.json")


def test_ours_has_the_types_and_the_bytes_of_the_peers_file(case: Case, tmp_path: Path) -> None:
    mixed = "quantize.rtn(scheme=w8a16g32, targets=['re:.*down_proj.*', embeddings]) | quantize.rtn(scheme=w4a16g32, targets=[attention])"
    peer = run(case.protocol.model, tmp_path / "peer", f"{mixed} | pack(format=gguf)").out / "model.gguf"
    types = types_of(peer, "llama")
    assert types["model.layers.1.mlp.down_proj.weight"] == types["model.embed_tokens.weight"] == "Q8_0"
    assert types["model.layers.0.self_attn.k_proj.weight"] == "Q4_0"
    assert types["model.layers.0.mlp.up_proj.weight"] == "BF16"
    assert sizes(peer)["types"] == {"BF16": 8, "Q4_0": 16, "Q8_0": 5}
    for method, lines in {"rtn": ["rtn"] * 3, "gptq": ["calibrate", "rtn", "gptq", "gptq"]}.items():
        passes = list(case.passes(method, peer))
        assert [name.removeprefix("quantize.") for line in passes for name in line] == [*lines, "pack"]
        recipe = tmp_path / f"{method}.yaml"
        recipe.write_text(json.dumps({"version": 1, "passes": passes}))
        out = compress.run(recipe, case.protocol.model, tmp_path / method).out / "model.gguf"
        assert types_of(out, "llama") == types
        assert sizes(out)["tensor_bytes"] == sizes(peer)["tensor_bytes"]


def test_a_type_that_no_scheme_has_is_told(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Case, "peer", lambda self, kind: tmp_path / "peer.gguf")
    monkeypatch.setattr(kquants, "types_of", lambda file, kind: {"model.layers.0.mlp.up_proj.weight": "IQ1_S"})
    with pytest.raises(InputError, match="IQ1_S"):
        list(case.passes("rtn", tmp_path / "peer.gguf"))
    row = case.measure("demo-rtn-Q4_K_M")
    assert "IQ1_S" in row["error"]
    assert case.known("demo-rtn-Q4_K_M") == row
    assert cells(row, 1)[1].startswith("failed: peer.gguf expected: types that a scheme has got: IQ1_S")


def test_the_page_has_every_row_and_keeps_remarks(case: Case) -> None:
    row = {"name": "demo-llama.cpp-Q4_K_M", "asked": "Q4_K_M", "built": "a package 1.0", "types": {"Q4_K": 3, "Q6_K": 2},
           "tensor_bytes": 1_000_000, "quality": QUALITY, "commit": "c"}  # fmt: skip
    case.keep(row)
    text = page([case], "A remark.")
    assert "<!-- remarks -->\nA remark.\n<!-- end -->" in text
    bits = f"{8_000_000 / case.weights:.3f}"
    assert f"| `llama.cpp-Q4_K_M` | {bits} | 1,000,000 | 0.25000 ± 0.01000 | 0.25 ± 0.01 | 25.0% ± 1.0% |" in text
    assert "* Q4_K_M: 3 Q4_K, 2 Q6_K" in text
    assert text.count("not measured") == 3
    assert "llama.cpp: a package 1.0" in text
    case.keep({"name": "demo-source", "quality": QUALITY, "tensor_bytes": 1})
    assert case.known(row["name"]) == row
    assert "quality" in case.known("demo-source")
    assert "quality" not in replace(case, protocol=replace(case.protocol, samples=8)).known(row["name"])


def test_a_second_text_has_its_columns(case: Case) -> None:
    two = replace(case, protocol=replace(case.protocol, also=case.protocol.calibrate))
    two.keep({"name": "demo-source", "quality": QUALITY, "also": QUALITY, "tensor_bytes": 1, "commit": "c"})
    text = page([two], "")
    assert "| same top-1 | on the second text | perplexity |" in text
    assert "| 25.0% ± 1.0% | 0.25000 ± 0.01000 | 0.25 ± 0.01 |" in text
    assert f"Second text: as many tokens of {case.protocol.calibrate.name}." in text
    assert {"quality", "also"} <= two.row("source", "", two.store).keys()


def test_a_tool_that_fails_is_told_by_its_last_line(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "llama-quantize"
    script.write_text('#!/bin/sh\necho "$1"\ntest -f "$2" && test -f "$3" && echo no type $5\nexit 3\n')
    script.chmod(0o755)
    monkeypatch.setattr(kquants, "llama_quantize", lambda tell: script)
    with pytest.raises(MachineError, match="status 3: no type Q4_K_M"):
        case.peer("Q4_K_M")


def test_importance_is_the_sum_of_squares_of_a_matrix_inputs(case: Case, tmp_path: Path) -> None:
    reader = pytest.importorskip("gguf").GGUFReader(case.importance)
    found = {tensor.name: torch.tensor(tensor.data).flatten() for tensor in reader.tensors}
    assert len(found) == 2 * 7 * 4
    ids = load_file(case.made(case.protocol.calibration, "calibration.safetensors"))["input_ids"]
    model = load(case.protocol.model, dtype=torch.float32).model
    inputs = model.layers[0].input_layernorm(model.embed_tokens(ids)).detach()
    assert torch.allclose(found["blk.0.attn_q.weight.in_sum2"], inputs.square().sum((0, 1)), rtol=1e-5)
    assert found["blk.3.ffn_down.weight.in_sum2"].shape == (384,)
    assert {float(found[name]) for name in found if name.endswith(".counts")} == {4 * 32.0}


def test_without_a_compiler_the_tools_are_refused_in_words(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    told: list[str] = []
    with pytest.raises(MachineError, match="no cmake"):
        llama_tools.llama_quantize(told.append)
    assert not told
    assert not (tmp_path / "cache").exists()


def test_more_neurons_compute_nearly_the_same(tmp_path: Path) -> None:
    start: Any = tiny_llama(tmp_path / "start")
    widen(start, tmp_path / "wide", neurons=128)
    dense, wide = load(start), load(tmp_path / "wide")
    assert wide.config.intermediate_size == 128
    difference = (logits(dense) - logits(wide)).abs().max() / logits(dense).std()
    assert 0 < difference < 0.05
