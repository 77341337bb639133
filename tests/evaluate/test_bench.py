"""bench: only what is right is timed, ratios are of the same case, and decoding is transformers' own greedy one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

import compress
from compress.checkpoint.reader import open_checkpoint
from compress.cli.app import build
from compress.cli.bench import numbers, show_speeds
from compress.errors import FormatError, InputError, UsageError
from compress.evaluate import bench
from compress.evaluate.bench import DECODE, DENSE, PACKED, Settings, Speed
from compress.evaluate.decoder import Decoder
from compress.kernels import bench as kernels
from compress.kernels.native.cpu import Cpu
from compress.kernels.native.packed import Packed
from compress.kernels.third_party_backends import Other
from compress.numerics.inputs import rounded_inputs
from families import build as build_family
from support import run, tiny_llama

NATIVE = "pack(format=native)"


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few copies of weights."""
    monkeypatch.setattr(kernels, "WEIGHT_BYTES", 1 << 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("bench") / "model")


@pytest.fixture(scope="module")
def packed(model: Path) -> Path:
    run(model, model.parent / "out", f"quantize.rtn(scheme=w4a16g32) | {NATIVE}")
    return model.parent / "out"


def rows(text: str, tokens: int = 3, **options: Any) -> list[kernels.Row]:
    return [*kernels.table([(1024, 64)], [kernels.parse_state(text)], [tokens], "cpu", torch.bfloat16, **options)]


@pytest.mark.parametrize("text", ["w2a16g64", "w4a16g64", "nvfp4"])
def test_columns_that_chunks_do_not_divide_are_timed(text: str) -> None:
    few = kernels.random_weight(kernels.parse_state(text), 48, 576, torch.bfloat16)
    assert few.values().shape == (48, 576)
    products = kernels.made(1536, 576, kernels.parse_state(text), "cpu", torch.bfloat16, "simd")
    x = torch.randn(2, 576).bfloat16()
    for product in products:
        torch.testing.assert_close(product.calls[0](x).float(), product.exact(x), rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("text", ["w4a16g32", "w3a16g16-asym", "fp8-block", "fp8-tensor-afp8", "nvfp4", "w8a8", "masked(2:4)"])
def test_every_product_of_a_case_is_of_one_weight_and_each_copy_of_it(text: str) -> None:
    state = kernels.parse_state(text)
    products = kernels.made(1024, 64, state, "cpu", torch.float32)
    assert products[0].what == kernels.DENSE
    assert {"cpu", "reference"} <= {product.what for product in products}
    x = torch.randn(3, 64)
    half = kernels.random_weight(state, 512, 64, torch.float32).values()
    for product in products:
        told = product.what == "integers" and state.scheme is not None and state.scheme.inputs
        given = rounded_inputs(x, state.scheme) if told and state.scheme is not None else x
        assert product.rounds is (product.what == "integers" and not told)
        wanted = linear(given, torch.cat([half, half]))
        assert len(product.calls) * product.weight_bytes >= kernels.WEIGHT_BYTES
        for call in product.calls:
            torch.testing.assert_close(call(x), wanted, rtol=1e-4, atol=0.3 if product.rounds else 1e-3)
        torch.testing.assert_close(product.exact(x), wanted)
    for row in rows(text):
        assert not row.fault
        assert 3 <= len(row.seconds) <= 9
        assert 0 < row.best <= row.median
        assert row.bandwidth == row.weight_bytes / row.best


def test_a_product_that_is_wrong_is_not_timed_and_ends_with_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = Cpu.linear
    monkeypatch.setattr(Cpu, "linear", lambda self, x, *rest: right(self, x, *rest) * (1.1 if self.name == "cpu" else 1))
    found = {row.what: row for row in rows("nf4g32")}
    assert found["cpu"].seconds == ()
    assert "of the largest output, where 0.02 is allowed" in found["cpu"].fault
    assert not found["reference"].fault
    words = ["bench", "--kernels", "--shapes", "512x64", "--schemes", "nf4g32", "--activations", "2", "--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        build(words)(words, standalone_mode=False)
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    assert "cpu, 512x64 codes(nf4g32), 2 tokens" in err
    assert "reference" in out
    # What raises is wrong as well, and NaN is.
    monkeypatch.setattr(Cpu, "linear", lambda self, x, *rest: x.new_full((len(x), 1024), math.nan))
    assert "off by nan" in next(row for row in rows("nf4g32") if row.what == "cpu").fault
    monkeypatch.setattr(Cpu, "linear", lambda self, x, *rest: x.no_such_thing)
    assert next(row for row in rows("nf4g32") if row.what == "cpu").fault.startswith("AttributeError")


def test_other_peoples_products_take_part_and_their_failures_are_told_and_no_fault_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def others(packed: Packed, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
        w = packed.values().to(dtype)
        yield "right", lambda: Other(w.nbytes, lambda: lambda x: linear(x, w))
        yield "own codes", lambda: Other(w.nbytes, lambda: lambda x: 2 * linear(x, w), lambda x: 2 * linear(x.float(), w.float()))
        yield "broken", lambda: linear(1, 2)

    monkeypatch.setattr(kernels, "others", others)
    found = {row.what: row for row in rows("nf4g32") if not row.ours}
    assert [bool(found[what].seconds) for what in (kernels.DENSE, "right", "own codes", "broken")] == [True, True, True, False]
    assert found["broken"].fault.startswith("TypeError")
    assert dict(zip(kernels.HEAD, kernels.cells([*found.values()], 1e9)[-1], strict=True))["how"] == found["broken"].fault


def test_one_backend_and_a_deadline() -> None:
    assert [row.what for row in rows("nf4g32", backend="cpu")] == [kernels.DENSE, "cpu"]
    with pytest.raises(UsageError, match="int4pack"):
        rows("nf4g32", backend="int4pack")
    skipped: list[str] = []
    assert rows("nf4g32", until=time.monotonic(), skipped=skipped.append) == []
    assert skipped == ["1024x64 codes(nf4g32), every number of tokens"]


def test_ratios_are_of_one_case() -> None:
    def row(what: str, tokens: int, seconds: float, ours: bool = True) -> kernels.Row:
        return kernels.Row(4096, 4096, "codes(w4a16g128)", tokens, what, ours, 8 << 20, 1e-3, (seconds, 2 * seconds), "graph")

    found = [row(kernels.DENSE, 1, 4e-3, False), row("gpu", 1, 1e-3), row("torch int4pack", 1, 2e-3, False), row("gpu", 8, 1e-3)]
    cells = kernels.cells(found, 16.777216e9)
    assert [dict(zip(kernels.HEAD, line, strict=True)) for line in cells][1] == {
        "layer": "7B qkv/o 4096x4096", "state": "codes(w4a16g128)", "tokens": "1", "product": "gpu", "min us": "1000.0",
        "median us": "1500.0", "GB/s": "8.4", "of peak": "50%", "by dense": "4.00x", "by best other": "2.00x", "off by": "0.001",
        "how": "graph",
    }  # fmt: skip
    assert cells[3][8:10] == ("-", "-")
    assert json.loads(json.dumps(kernels.facts(found[1])))["best_seconds"] == 1e-3


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [("NVIDIA H100 80GB HBM3", 3.35e12), ("NVIDIA A100-SXM4-80GB", 2.04e12), ("NVIDIA L40S", 0.864e12), ("Tesla T4", 0.32e12)],
)
def test_peak_is_that_of_the_name(name: str, bandwidth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert kernels.peak_bandwidth("cuda") == (bandwidth, f"nominal, of {name}")


def test_peak_is_measured_where_no_name_tells() -> None:
    bandwidth, whence = kernels.peak_bandwidth("cpu")
    assert 1e8 < bandwidth < 1e13
    assert "measured" in whence


def test_what_cannot_be_timed_is_refused() -> None:
    for text in ("w7a16", "codes(w4a16)+outliers(0.1)", "dense", "codes(w4a16", ""):
        with pytest.raises(UsageError):
            kernels.parse_state(text)
    assert numbers("--batch", "1,8") == (1, 8)
    for text in ("0", "1,", "a", "-1", "1.5"):
        with pytest.raises(UsageError, match="above 0"):
            numbers("--batch", text)
    for words in (
        ["--kernels", "--against", "x"],
        ["x", "--activations", "1"],
        [],
        ["--kernels", "--shapes", "64"],
        ["--kernels", "x"],
    ):
        done = subprocess.run([sys.executable, "-P", "-m", "compress", "bench", *words], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
def test_decoding_is_greedy_with_either_cache(name: str, tmp_path: Path) -> None:
    run(build_family(name, tmp_path), tmp_path / "out", f"quantize.rtn(scheme=w8a16) | {NATIVE}")
    model: Any = compress.load(tmp_path / "out", "float32")
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    for static in (False, True):
        decoder = Decoder(model, ids, 5, static)
        for _ in range(2):
            with torch.no_grad():
                decoder.prompt()
                found = [ids, decoder.token.clone()]
                for _ in range(5):
                    decoder.advance()
                    found.append(decoder.token.clone())
            for length in range(7, 13):
                sequence = torch.cat(found, 1)
                with torch.no_grad():
                    logits = model(input_ids=sequence[:, :length], use_cache=False).logits[:, -1]
                best, taken = logits.max(-1).values, logits.gather(1, sequence[:, length : length + 1])[:, 0]
                assert float((best - taken).max()) < 1e-4


class FakeGraph:
    """A CUDA graph that runs what was put into it; `wrong` ones run it twice."""

    wrong = False

    def __init__(self) -> None:
        self.run: Any = None

    def replay(self) -> None:
        for _ in range(1 + self.wrong):
            self.run()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """torch.cuda as far as capturing needs it, on the CPU; `run` is what is captured, `fails` an error instead."""
    told: dict[str, Any] = {"run": None, "fails": None}

    @contextmanager
    def graph(captured: FakeGraph) -> Iterator[None]:
        if told["fails"]:
            raise told["fails"]
        yield
        captured.run = told["run"]

    fake = SimpleNamespace(wait_stream=lambda other: None)
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 2.0)
    for name, value in {
        "Stream": lambda: fake, "current_stream": lambda: fake, "stream": lambda which: nullcontext(), "CUDAGraph": FakeGraph,
        "graph": graph, "synchronize": lambda: None, "Event": lambda **options: event,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return told


def test_a_step_is_the_replay_of_a_graph_where_that_gives_the_same_tokens(
    packed: Path, cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = compress.load(packed, "float32")
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))

    def captured() -> Decoder:
        decoder = Decoder(model, ids, 5, static=True)
        cuda["run"] = decoder.step
        with torch.no_grad():
            decoder.capture()
        return decoder

    decoder = captured()
    assert decoder.how == "graph"
    assert decoder.advance.__name__ == "replay"
    monkeypatch.setattr(FakeGraph, "wrong", True)
    assert captured().how == "eager, for a CUDA graph generates other tokens"
    cuda["fails"] = RuntimeError("operation not permitted when stream is capturing\nmore")
    decoder = captured()
    assert decoder.how.endswith("could be captured: operation not permitted when stream is capturing")
    assert decoder.advance == decoder.step


def test_products_are_replayed_in_turns(cuda: dict[str, Any]) -> None:
    x, called = torch.zeros(1), list[int]()
    calls = [lambda x, i=i: called.append(i) or x for i in range(3)]
    cuda["run"] = lambda: None
    round_, how = kernels._cuda_round(calls, x)
    # Once before, once into the graph; each of three, and the first again to make four.
    assert (how, called) == ("graph", [0, 1, 2, 0] * 2)
    assert round_() == 2e-3 / 4
    cuda["fails"] = RuntimeError("no")
    round_, how = kernels._cuda_round(calls, x)
    assert how == "eager"
    called.clear()
    round_()
    assert called == [0, 1, 2, 0]


def test_a_model_is_checked_before_it_is_timed(packed: Path, model: Path) -> None:
    settings, checkpoints = Settings(prompt=8, new=4, batches=(1, 3), rounds=2), [open_checkpoint(packed), open_checkpoint(model)]
    bench.check_settings(checkpoints, settings)
    ids = bench.prompts(checkpoints, settings, None)
    assert ids.shape == (3, 8)
    assert torch.equal(ids, bench.prompts(checkpoints, settings, None))
    subject = bench.load_packed(checkpoints[0], settings)
    assert subject.backends == {"simd": 14}
    assert 0 < bench.check(checkpoints[0], subject, ids) < 0.02
    exact = bench.load_packed(checkpoints[0], Settings(dtype="float32"))
    assert bench.check(checkpoints[0], exact, ids) < 1e-5
    dense = bench.load_dense(checkpoints[1], settings, torch.bfloat16)
    assert dense.memory.tensor_bytes == open_checkpoint(model).nbytes + sum(b.nbytes for b in dense.model.buffers())
    speeds = bench.timed([subject, dense], ids, settings)
    assert [(s.label, s.batch, s.phase) for s in speeds] == [
        (label, batch, phase) for batch in (1, 3) for label in (PACKED, DENSE) for phase in ("prompt", DECODE)
    ]
    assert all(len(s.rates) == 2 and s.best >= s.median > 0 for s in speeds)
    whole = bench.load_packed(checkpoints[0], Settings(dtype="float32", backend="integers"))
    assert 1e-4 < bench.check(checkpoints[0], whole, ids) < 0.05
    assert (whole.rounds, whole.allowed) == (True, bench.ROUNDED)
    assert (exact.rounds, exact.allowed) == (False, bench.ALLOWED["float32"])
    exact.model.model.layers[1].mlp.up_proj.packed_weight.get_buffer("tiles").zero_()
    with pytest.raises(FormatError, match="nothing was timed"):
        bench.check(checkpoints[0], exact, ids)


def test_models_that_cannot_be_timed_are_refused(packed: Path, model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(packed)
    with pytest.raises(UsageError, match="at most 64 tokens"):
        bench.check_settings([checkpoint], Settings(prompt=60, new=5))
    with pytest.raises(InputError, match="native format"):
        bench.check_settings([open_checkpoint(model)], Settings(prompt=8, new=4))
    with pytest.raises(InputError, match="a dense checkpoint"):
        bench.check_settings([checkpoint, checkpoint], Settings(prompt=8, new=4))
    run(build_family("t5", tmp_path), tmp_path / "out", f"quantize.rtn(scheme=w8a16) | {NATIVE}")
    with pytest.raises(InputError, match="a decoder"):
        bench.check_settings([open_checkpoint(tmp_path / "out")], Settings(prompt=8, new=4))


def test_an_artifact_of_another_tool_is_repacked_where_that_is_asked_for(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", "quantize.rtn(scheme=w4a16g32) | pack(format=gptq)")
    checkpoint, settings = open_checkpoint(tmp_path / "out"), Settings(prompt=8, new=4)
    with pytest.raises(InputError, match="repack"):
        bench.check_settings([checkpoint], settings)
    settings = replace(settings, repack=True, dtype="float32")
    bench.check_settings([checkpoint], settings)
    subject = bench.load_packed(checkpoint, settings)
    assert subject.backends == {"simd": 14}
    assert bench.check(checkpoint, subject, torch.arange(8)[None]) < 1e-5


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_speeds_memory_and_protocol(
    packed: Path, model: Path, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", str(packed), "--against", str(model), "--prompt", "8", "--new", "2", "--batch", "1,2", "--device", "cpu"]
    words += ["--json"] if as_json else []
    build(words)(words, standalone_mode=False)
    text = capsys.readouterr().out
    if as_json:
        found = json.loads(text)
        assert found["difference"] < found["allowed"]
        assert {speed["label"] for speed in found["speeds"]} == {PACKED, DENSE}
        assert found["memory"][PACKED]["tensor_bytes"] < found["memory"][DENSE]["tensor_bytes"]
        return
    for word in (
        "tokens a second",
        "ratio",
        "memory after load",
        "14 weights simd",
        "torch ",
        "bfloat16",
        "random, seed 0",
        " threads",
    ):
        assert word in text


def test_ratios_of_speeds_are_of_medians(capsys: pytest.CaptureFixture[str]) -> None:
    eager = Speed(PACKED, 1, DECODE, (10.0, 30.0, 20.0), "graph")
    show_speeds([eager, Speed(DENSE, 1, DECODE, (10.0, 10.0, 99.0))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["batch", "phase", "packed", "dense", "ratio", "how"]
    assert lines[2].split() == ["1", "decode", "20.0", "(30.0)", "10.0", "(99.0)", "2.00x", "graph"]
    show_speeds([eager])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["batch", "phase", "packed", "how"]
    assert lines[2].split() == ["1", "decode", "20.0", "(30.0)", "graph"]
