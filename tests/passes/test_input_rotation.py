"""Rotated inputs: codes of W R, in every pass that makes them, as a model computes, trains and runs packed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.architecture.qlinear import QLinear
from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.errors import CompressError, FormatError, UsageError
from compress.evaluate.verify import verify_bytes
from compress.executors.train.student import Student
from compress.kernels.native import rotate_inputs
from compress.kernels.native.modules import PackedLinear
from compress.layerwise.dense_view import DenseView
from compress.layerwise.logits import Forward
from compress.layerwise.model import build
from compress.numerics.gptq import solve
from compress.numerics.gptq_task import Settings
from compress.numerics.hessian import Hessian, PairedHessian, prepare
from compress.numerics.input_rotation import rotated, rotated_both
from compress.numerics.inputs import InputRounding, rounded_inputs
from compress.numerics.qtensor import QTensor
from compress.numerics.rounding import nearest
from compress.spec.scheme import ROTATED, Scheme
from families import build as build_family
from support import CALIBRATE, do, kl, load, logits, ready_inputs, tiny_llama

BEGIN = f"calibrate(data={ready_inputs()}, samples=6, length=24)"
SCHEMES = ["w4a16g32-h32", "w3a16g32-asym-h64", "w4a16g64-min-h16", "mxfp4-h32", "nvfp4-h16", "nf4g32-h128", "fp8-h64", "w4a8g32-h32",
           "w4a4-aasym-h128", "mxfp4-amxfp4-h32", "nvfp4-anvfp4-h16"]  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("wide"), hidden_size=128, intermediate_size=256)


@pytest.mark.parametrize("n", ROTATED)
def test_a_block_is_multiplied_by_an_orthogonal_matrix_of_equal_entries(n: int) -> None:
    r = rotated(torch.eye(2 * n), n)
    assert torch.equal(r[:n, n:], torch.zeros(n, n))
    assert torch.equal(r[:n, :n].abs(), torch.full((n, n), n**-0.5))
    torch.testing.assert_close(r @ r.T, torch.eye(2 * n))
    assert torch.equal(r, r.T)
    x = torch.randn(3, 2, 2 * n, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotated(x, n), x @ r)
    torch.testing.assert_close(rotated(rotated(x, n), n), x)
    assert rotated(x.bfloat16(), n).dtype == torch.bfloat16
    assert rotated(x, 0) is x
    m = torch.randn(2 * n, 2 * n, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rotated_both(m, n), r.T @ m @ r)


@pytest.mark.parametrize("text", SCHEMES)
def test_codes_are_of_the_rotated_weight(text: str) -> None:
    """And what they mean is rotated back: the same numbers as without -h, of W R."""
    scheme = Scheme.parse(text)
    assert str(scheme) == text
    plain = replace(scheme, hadamard=0)
    w = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    w[:, ::50] *= 20
    found, other = nearest(w, scheme, torch.float32, "mse"), nearest(rotated(w, scheme.hadamard), plain, torch.float32, "mse")
    assert torch.equal(found.q.codes, other.q.codes)
    assert torch.equal(found.q.values(), other.q.dequantize())
    assert torch.equal(found.q.dequantize(), rotated(other.q.dequantize(), scheme.hadamard))
    assert found.squared_error == pytest.approx(float((found.q.dequantize() - w).square().sum()), rel=1e-3)
    # Outliers of a column are spread over its block, so that less is lost where a scale covers it; steps of FP8 are relative.
    if plain.group is not None and plain.group >= 32:
        assert found.squared_error < nearest(w, plain, torch.float32, "mse").squared_error


@pytest.mark.parametrize("text", ["w8a8-h32", "mxfp4-amxfp4-h32", "w4a4-aasym-h64"])
def test_inputs_are_rounded_while_they_are_rotated(text: str) -> None:
    scheme = Scheme.parse(text)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= 30
    how, plain = InputRounding(scheme), replace(scheme, hadamard=0)
    inside = rounded_inputs(rotated(x, scheme.hadamard), plain)
    assert torch.equal(how.of_codes(x), inside)
    assert torch.equal(how(x), rotated(inside, scheme.hadamard))
    assert float((how(x) - x).norm()) < float((rounded_inputs(x, plain) - x).norm())


def test_statistics_are_rotated_as_if_inputs_had_been() -> None:
    g = torch.Generator().manual_seed(0)
    u, x, r = (torch.randn(200, n, generator=g, dtype=torch.float64) for n in (64, 64, 48))
    made = [PairedHessian(64, torch.float64) for _ in range(2)]
    for statistic, n in zip(made, (0, 32), strict=True):
        statistic.expect_residual(48)
        # fp64, but rotations are in fp32.
        a, b = (rotated(part.float(), n).double() for part in (u, x))
        statistic.add_pair(a, b)
        statistic.add_residual(a, r)
    found, truth = prepare(made[0], 0.01, "none", 8, "", hadamard=32), prepare(made[1], 0.01, "none", 8, "")
    w = torch.randn(48, 64, generator=g)
    for name in ("hessian", "correction", "addition"):
        torch.testing.assert_close(getattr(found, name).float(), getattr(truth, name).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.target(w.double()), truth.target(w.double()), rtol=1e-4, atol=1e-4)


def test_gptq_of_a_weight_is_gptq_of_the_rotated_one(wide: Path, tmp_path: Path) -> None:
    """The pass against the solver, given rotated inputs by hand."""
    do(wide, tmp_path / "out", f"{BEGIN} | quantize.gptq(scheme=w3a16g32-h32, targets=['re:.*layers.0.self_attn.q_proj'])")
    seen: list[torch.Tensor] = []
    model = load(wide, dtype=torch.float32)
    model.get_submodule("model.layers.0.self_attn.q_proj").register_forward_pre_hook(lambda _, a: seen.append(a[0][0]))
    ids = load_file(ready_inputs())["input_ids"]
    with torch.no_grad():
        for sample in ids:
            model(sample[None])
    statistic = Hessian(128)
    for x in seen:
        statistic.add(rotated(x, 32))
    prepared = prepare(statistic, 0.01, "activation", 8, "")
    name = "model.layers.0.self_attn.q_proj.weight"
    w = open_checkpoint(wide).read(name)
    scheme = Scheme.parse("w3a16g32")
    truth = solve(rotated(w.float(), 32), prepared.factor, prepared.hessian, scheme, w.dtype, Settings())
    q = DenseView(open_checkpoint(tmp_path / "out")).qtensor(name)
    assert q is not None
    assert float((q.codes == truth.codes).float().mean()) > 0.995
    meant = QTensor(scheme, truth.codes, truth.scale, truth.zero).dequantize()
    lost = [float((part @ (rotated(w.float(), 32) - values).T).square().sum()) for part in [torch.cat([rotated(x, 32) for x in seen])]
            for values in (q.values(), meant)]  # fmt: skip
    assert lost[0] == pytest.approx(lost[1], rel=0.01)


@pytest.mark.parametrize("options", [
    "", ", correct=qronos, feedback=both",
    pytest.param(", correct=residual", marks=pytest.mark.slow), pytest.param(", order=stored", marks=pytest.mark.slow),
])  # fmt: skip
def test_gptq_beats_rounding_with_rotated_inputs(tmp_path: Path, options: str) -> None:
    """On the trained model that ships, each of GPTQ's additions has less KL than rounding with the same codes."""
    from compress import demo

    source = Path(demo.__file__).parent / "model"
    found = {}
    for name, line in (("rtn", "quantize.rtn(scheme=w3a16g32-h32, clip=mse, ragged=divide)"),
                       ("gptq", f"{CALIBRATE.replace('32', '8', 1)} | quantize.gptq(scheme=w3a16g32-h32, ragged=divide{options})")):  # fmt: skip
        do(source, tmp_path / name, line)
        found[name] = kl(source, tmp_path / name)
    assert found["gptq"] < 0.97 * found["rtn"]


@pytest.mark.parametrize("text", SCHEMES)
def test_the_native_artifact_runs_what_codes_mean(wide: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By our backends, which multiply codes by rotated inputs, and by `eval`, which multiplies what they mean."""
    if Scheme.parse(text).inputs:
        # Sums in another order may be rounded to another number; tests/kernels/test_steps.py has the kernel.
        monkeypatch.setattr(rotate_inputs, "MOST", 0)
    begin = f"{BEGIN} | " if "nvfp4" in text else ""
    pass_ = "gptq" if begin else "rtn"
    do(wide, tmp_path / "out", f"{begin}quantize.{pass_}(scheme={text}) | pack(format=native)")
    assert open_checkpoint(tmp_path / "out").config["quantization_config"]["version"] == 6
    verify_bytes(open_checkpoint(tmp_path / "out"), Context())
    packed, meant = compress.load(tmp_path / "out", "float32"), build(open_checkpoint(tmp_path / "out"), rounded=False)
    linears = [path for path, module in packed.named_modules() if isinstance(module, PackedLinear)]
    assert len(linears) == 14
    for path in linears[:7]:
        own, other = packed.get_submodule(path), meant.get_submodule(path)
        torch.testing.assert_close(own.weight.float(), other.weight.float(), rtol=1e-4, atol=1e-5)
        for tokens in (1, 30):  # few and many go by other kernels
            x = torch.randn(tokens, own.in_features, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(own(x), other(x), rtol=1e-4, atol=1e-4)
    ids = load_file(ready_inputs())["input_ids"]
    with torch.no_grad():
        whole = build(open_checkpoint(tmp_path / "out"))(input_ids=ids, use_cache=False).logits
        assert torch.equal(next(Forward(open_checkpoint(tmp_path / "out")).logits([ids])).view_as(whole), whole)
    do(tmp_path / "out", tmp_path / "again", "unpack | pack(format=native)")
    first, second = (open_checkpoint(tmp_path / name) for name in ("out", "again"))
    assert all(torch.equal(first.read(n).view(torch.uint8), second.read(n).view(torch.uint8)) for n in first.refs if "tiles" in n)


def test_the_reader_in_the_documentation_reads_them(wide: Path, tmp_path: Path) -> None:
    do(wide, tmp_path / "out", "quantize.rtn(scheme=w4a16g32-h32) | pack(format=native)")
    text = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
    scope: dict[str, Any] = {}
    exec(text.partition("```python\n")[2].partition("```")[0], scope)
    checkpoint, name = open_checkpoint(tmp_path / "out"), "model.layers.0.self_attn.q_proj.weight"
    entry = scope["entry_of"](json.loads((tmp_path / "out" / "config.json").read_text()), name)
    assert entry["state"] == "codes(w4a16g32-h32)"
    tiles, scale = (checkpoint.read(f"{name}.{part}") for part in ("tiles", "scale"))
    found = torch.from_numpy(scope["rotated"](scope["integers"](entry, tiles.numpy(), scale.float().numpy(), None), 32))
    q = DenseView(checkpoint).qtensor(name)
    assert q is not None
    torch.testing.assert_close(found, q.dequantize(), rtol=1e-5, atol=1e-6)


def test_scales_get_the_gradient_of_rotated_codes(wide: Path, tmp_path: Path) -> None:
    """Against finite differences of the loss by each scale."""
    do(wide, tmp_path / "out", "quantize.rtn(scheme=w3a16g32-h32)")
    module = torch.nn.Linear(128, 128, bias=False)
    q = DenseView(open_checkpoint(tmp_path / "out")).qtensor("model.layers.0.self_attn.q_proj.weight")
    assert q is not None
    q = replace(q, scale=q.scale.float())
    from compress.architecture.qlinear import with_codes

    with_codes(module, q, torch.float32, torch.float32)
    assert isinstance(module, QLinear)
    torch.testing.assert_close(module.weight, q.dequantize(), rtol=0, atol=1e-6)
    gain = module.learn()["gain"]
    toward = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    (module.weight * toward).sum().backward()
    assert gain.grad is not None
    # The loss is linear in a gain: its share of what codes say, times the gradient rotated as they are.
    share = (q.values() * rotated(toward, 32)).view(128, -1, 32).sum(-1)
    torch.testing.assert_close(gain.grad, share, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("line", [pytest.param("distill.logits(data='{text}', samples=8, length=64, batch=4, micro_batch=2, epochs=2)",
                                               marks=pytest.mark.slow),
                                  "distill.logits(data='{text}', samples=8, length=64, batch=4, micro_batch=2, epochs=2, latent=true, lr=1e-3)",
                                  "quantize.learned(epochs=4, batch=2, micro_batch=1)"])  # fmt: skip
def test_what_trains_codes_trains_rotated_ones(tmp_path: Path, line: str) -> None:
    from compress import demo

    source, text = Path(demo.__file__).parent / "model", Path(demo.__file__).parent / "text" / "calibration.jsonl"
    begin = f"calibrate(data='{text}', samples=8, length=64) | quantize.rtn(scheme=w3a16g32-h32, ragged=divide)"
    do(source, tmp_path / "out", f"{begin} | {line.format(text=text)} | pack(format=native)")
    do(source, tmp_path / "before", "quantize.rtn(scheme=w3a16g32-h32, ragged=divide)")
    assert kl(source, tmp_path / "out") < 0.97 * kl(source, tmp_path / "before")
    verify_bytes(open_checkpoint(tmp_path / "out"), Context())


@pytest.mark.parametrize(("family", "line", "said"), [
    ("mixtral", "quantize.rtn(scheme=w4a16g32-h32)", "rotates inputs, which nothing here does with an expert's"),
    ("gpt2", "quantize.rtn(scheme=w4a16g32-h32)", "it is a Conv1D"),
    ("wide", "quantize.rtn(scheme=w4a16g32-h32, targets=[embeddings])", "with a embedding's|with an embedding's"),
    ("wide", "prune.magnitude(sparsity=0.5) | quantize.rtn(scheme=w4a16g32-h32)", "would mix its zeros"),
    ("wide", "quantize.rtn(scheme=w4a16g32-h32, outliers=0.01)", "mixes outliers with other weights"),
    ("wide", "quantize.rtn(scheme=w4a16g32-h32) | quantize.lorc(rank=4)", "multiplies factors by those"),
    ("wide", "quantize.loftq(scheme=w4a16g32-h32, rank=4)", "loftq rounds weights as they are"),
    ("wide", "quantize.llm_mq(schemes=[w4a16g32-h32], bits=4)", "llm_mq rounds weights as they are"),
    ("wide", "quantize.quik(scheme=w4a4-h32)", "quik rounds weights as they are"),
    ("wide", "quantize.gptq(scheme=w4a16g32-h32, sparsity=0.5)", "which mixes zeros with what is kept"),
    ("narrow", "quantize.rtn(scheme=w4a16g32-h64)", "blocks of 64 do not divide the 96 inputs"),
])  # fmt: skip
def test_what_cannot_be_rotated_is_refused(wide: Path, tmp_path: Path, family: str, line: str, said: str) -> None:
    source = (
        wide
        if family == "wide"
        else tiny_llama(tmp_path / "n", hidden_size=96)
        if family == "narrow"
        else build_family(family, tmp_path)
    )
    begin = f"{BEGIN} | " if "gptq" in line or "llm_mq" in line or "quik" in line else ""
    with pytest.raises(CompressError, match=said):
        do(source, tmp_path / "out", begin + line)


@pytest.mark.parametrize("fmt", ["compressed-tensors", "gptq", "awq", "gguf", "mlx"])
def test_readers_that_do_not_rotate_are_refused(wide: Path, tmp_path: Path, fmt: str) -> None:
    with pytest.raises(FormatError, match=r"rotation\(h32\)"):
        do(wide, tmp_path / "out", f"quantize.rtn(scheme=w4a16g32-h32) | pack(format={fmt})")


def test_a_dense_model_of_them_needs_no_rotation(wide: Path, tmp_path: Path) -> None:
    do(wide, tmp_path / "codes", "quantize.rtn(scheme=w4a16g32-h32) | pack(format=native)")
    do(tmp_path / "codes", tmp_path / "dense", "unpack(to=dense)")
    assert torch.equal(logits(load(tmp_path / "dense", dtype=torch.float32)), logits(build(open_checkpoint(tmp_path / "codes"))))


@pytest.mark.parametrize(
    "text", ["fp8-tensor-h32", "fp8-block-h128", "iq4_nl-h32", "w4a16g32-h8", "w4a16g32-h48", "q4_k-h32", "mxfp4-h32-amxfp4"]
)
def test_schemes_that_there_are_not(text: str) -> None:
    with pytest.raises(UsageError):
        Scheme.parse(text)


def test_student_of_rotated_codes_computes_what_they_mean(wide: Path, tmp_path: Path) -> None:
    do(wide, tmp_path / "out", "quantize.rtn(scheme=w4a8g32-h32)")
    student = Student(open_checkpoint(tmp_path / "out"))
    ids = load_file(ready_inputs())["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(
            student.module(input_ids=ids, use_cache=False).logits,
            build(open_checkpoint(tmp_path / "out"))(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4,
        )  # fmt: skip
