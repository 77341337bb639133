"""Passes and formats over schemes of floats and of rounded activations, on tiny models of several families."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.architecture.qlinear import QLinear
from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.contract import base_passes
from compress.contract.fused_groups import together
from compress.errors import CompressError, CoverageError, FormatError, InputError
from compress.evaluate.verify import verify_bytes
from compress.executors.train.student import Student
from compress.kernels.native.modules import PackedLinear
from compress.layerwise.dense_view import DenseView
from compress.layerwise.logits import Forward
from compress.layerwise.model import build
from compress.numerics.inputs import rounded_inputs
from compress.numerics.qtensor import as_matrix
from compress.numerics.rounding import nearest
from compress.spec.scheme import Scheme
from families import build as build_family
from support import dense_meaning, do, load, logits, ready_inputs, shared, step_of, tiny_llama

SCHEMES = ["nf4g32", "fp8", "mxfp4", "nvfp4"]
FAMILIES = ["llama", "mixtral", "gpt_oss", "gpt2", "bert", "t5"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")
    wide = tiny_llama(folder / "wide", hidden_size=128, intermediate_size=256)
    return lambda name: wide if name == "wide" else folder / name if (folder / name).exists() else build_family(name, folder)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_to_nearest_is_reloaded_and_run(models: Any, tmp_path: Path, family: str, scheme: str) -> None:
    source = models(family)
    result = do(source, tmp_path / "out", f"quantize.rtn(scheme={scheme})")
    dense, dense_view = open_checkpoint(source), DenseView(open_checkpoint(tmp_path / "out"))
    assert len(dense_view.weights) == len(result.manifest.weights)
    for name, (weight, state) in dense_view.weights.items():
        q, w = dense_view.qtensor(name), as_matrix(weight, dense.read(name))
        assert q is not None
        assert str(state) == f"codes({scheme})"
        if scheme != "nvfp4":
            again = nearest(w, Scheme.parse(scheme), w.dtype).q
            assert torch.equal(again.codes, q.codes)
            assert torch.equal(again.dequantize(), q.dequantize())
        assert float((q.dequantize() - w.float()).norm() / w.float().norm()) < {"fp8": 0.03}.get(scheme, 0.13)
    ours = logits(build(open_checkpoint(tmp_path / "out")))
    assert torch.equal(ours, logits(build(open_checkpoint(dense_meaning(tmp_path / "out", tmp_path / "dense")))))


@pytest.mark.parametrize(("family", "scheme"), shared(FAMILIES, SCHEMES))
def test_gptq_beats_rounding_on_its_own_tokens(models: Any, tmp_path: Path, family: str, scheme: str) -> None:
    begin = f"calibrate(data={ready_inputs()}, samples=6, length=24)"
    do(models(family), tmp_path / "gptq", f"{begin} | quantize.gptq(scheme={scheme}, min_tokens=1)")
    do(models(family), tmp_path / "rtn", f"quantize.rtn(scheme={scheme})")
    truth = logits(load(models(family), dtype=torch.float32))
    found, plain = (logits(build(open_checkpoint(tmp_path / name))) for name in ("gptq", "rtn"))
    assert bool(found.isfinite().all())
    assert float((found - truth).norm()) < 1.1 * float((plain - truth).norm())
    verify_bytes(open_checkpoint(tmp_path / "gptq"), Context())


@pytest.mark.parametrize(("family", "rounded"), shared(
    ["bert", "t5", "gpt2", "mixtral"],
    ["rtn(scheme=w3a16g32)", "gptq(scheme=w3a16g32)", "rtn(scheme=nf4g32)", "rtn(scheme=fp8)"],
))  # fmt: skip
def test_what_rounding_cost_is_made_up_for_in_every_kind_of_model(models: Any, tmp_path: Path, family: str, rounded: str) -> None:
    begin = f"calibrate(data={ready_inputs()}, samples=6, length=24) | quantize.{rounded}"
    do(models(family), tmp_path / "codes", begin)
    made = do(models(family), tmp_path / "out", f"{begin} | quantize.lorc(rank=4)").manifest
    before = do(models(family), tmp_path / "codes", begin).manifest
    assert made.weights.keys() == before.weights.keys()
    for name, record in made.weights.items():
        assert "lowrank(r4-int8)" in record.state
        assert (record.error or 0.0) < (before.weights[name].error or 0.0)
    truth = logits(load(models(family), dtype=torch.float32))
    assert bool((logits(build(open_checkpoint(tmp_path / "out"))) - truth).isfinite().all())
    verify_bytes(open_checkpoint(tmp_path / "out"), Context())


PACKED = [
    "fp8", "fp8-tensor", "fp8-block", "mxfp4", "nvfp4", "nvfp4-4over6", "w8a8", "w4a8g32", "w4a8g32-afp8", "fp8-afp8",
    "fp8-block-afp8", "mxfp4-afp8", "w4a4", "w4a4g32", "w3a4g32", "w4a4-aasym", "w8a8-aasym", "mxfp4-amxfp4", "nvfp4-anvfp4",
]  # fmt: skip


@pytest.mark.parametrize("scheme", PACKED)
def test_what_is_packed_is_what_transformers_runs(models: Any, tmp_path: Path, scheme: str) -> None:
    """Bit for bit, rounded activations included; and every tensor comes back, with our manifest and without."""
    pytest.importorskip("compressed_tensors")
    do(models("wide"), tmp_path / "out", f"quantize.rtn(scheme={scheme}) | pack")
    ours = logits(build(open_checkpoint(tmp_path / "out"), "bfloat16"))
    assert torch.equal(logits(load(tmp_path / "out", dtype=torch.bfloat16)), ours)
    verify_bytes(open_checkpoint(tmp_path / "out"), Context())
    alone = tmp_path / "alone"
    shutil.copytree(tmp_path / "out", alone, ignore=shutil.ignore_patterns("manifest.json"))
    assert torch.equal(logits(build(open_checkpoint(alone), "bfloat16")), ours)
    for source in (tmp_path / "out", alone):
        do(source, tmp_path / "again" / source.name, "unpack | pack")
        first, second = (open_checkpoint(place) for place in (source, tmp_path / "again" / source.name))
        assert first.refs.keys() == second.refs.keys()
        for name in first.refs:
            a, b = first.read(name), second.read(name)
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize(("scheme", "family"), [("fp8", "mixtral"), ("mxfp4", "mixtral"), ("nvfp4", "bert"), ("w8a8", "bert")])
def test_packed_experts_and_encoders(models: Any, tmp_path: Path, scheme: str, family: str) -> None:
    pytest.importorskip("compressed_tensors")
    do(models(family), tmp_path / "out", f"quantize.rtn(scheme={scheme}) | pack")
    ours = logits(build(open_checkpoint(tmp_path / "out"), "bfloat16"))
    assert torch.equal(logits(load(tmp_path / "out", dtype=torch.bfloat16)), ours)


@pytest.mark.parametrize(("first", "second"), [("fp8", "nvfp4"), ("w8a8", "fp8-afp8"), ("mxfp4", "w4a16g32")])
def test_schemes_of_different_formats_in_one_artifact(models: Any, tmp_path: Path, first: str, second: str) -> None:
    pytest.importorskip("compressed_tensors")
    lines = f"quantize.rtn(scheme={first}, targets=attention) | quantize.rtn(scheme={second}, targets=mlp) | pack"
    do(models("wide"), tmp_path / "out", lines)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(said["config_groups"]) == 2
    assert said["format"] == "mixed-precision"
    ours = logits(build(open_checkpoint(tmp_path / "out"), "bfloat16"))
    assert torch.equal(logits(load(tmp_path / "out", dtype=torch.bfloat16)), ours)


@pytest.mark.parametrize(
    ("family", "scheme", "options", "said"),
    [
        ("llama", "nf4g32", "", "no format of it holds nf4g32"),
        ("llama", "e3m0g32", "", "no format of it holds"),
        ("llama", "fp8-e5m2", "", "no format of it holds"),
        ("llama", "fp4g32-m2", "", "no format of it holds"),
        ("llama", "w8a8", "(dequantize=true)", "no longer rounds"),
        ("llama", "w8a8-asym", "", "zero points beside int8"),
        ("llama", "w4a4g32-asym", "", "zero points beside int4"),
        ("llama", "nvfp4-anvfp4", "(dequantize=true)", "no longer rounds"),
        ("llama", "w4a4g32", "(format=awq)", "16-bit activations"),
        ("llama", "nvfp4-anvfp4", "(format=gguf)", "in its own way"),
        ("llama", "w4a4g32", "(format=mlx)", "16-bit"),
        ("llama", "w4a4g32", "(format=peft)", "would not round"),
        ("mixtral", "nvfp4", "", "loses the scales"),
        ("gpt2", "fp8", "", "Conv1D"),
        ("llama", "mxfp4", "(format=gptq)", "integer weights"),
        ("llama", "w4a8g32", "(format=awq)", "16-bit activations"),
    ],
)
def test_what_no_reader_holds_is_refused(models: Any, tmp_path: Path, family: str, scheme: str, options: str, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        do(models(family), tmp_path / "out", f"quantize.rtn(scheme={scheme}) | pack{options}")


@pytest.mark.parametrize(("scheme", "said"), [(s, "rounds activations") for s in ("fp8-afp8", "w8a8", "nvfp4-anvfp4")])
def test_activations_that_nothing_would_round_are_refused(models: Any, tmp_path: Path, scheme: str, said: str) -> None:
    with pytest.raises(CoverageError, match=said):
        do(models("mixtral"), tmp_path / "out", f"quantize.rtn(scheme={scheme})")


def test_fixed_groups_are_not_changed(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "odd", intermediate_size=88)
    for ragged in ("refuse", "divide", "channel"):
        with pytest.raises(CompressError, match="do not divide 88"):
            do(source, tmp_path / ragged, f"quantize.rtn(scheme=mxfp4, ragged={ragged})")
    do(source, tmp_path / "free", "quantize.rtn(scheme=nf4g64, ragged=channel)")
    schemes = {str(state.scheme) for _, state in DenseView(open_checkpoint(tmp_path / "free")).weights.values()}
    assert schemes == {"nf4g64", "nf4"}


@pytest.mark.parametrize("pass_", ["rtn", "gptq"])
def test_what_readers_fuse_shares_the_scale_of_the_matrix(models: Any, tmp_path: Path, pass_: str) -> None:
    for scheme in ("nvfp4", "fp8-tensor"):
        begin = f"calibrate(data={ready_inputs()}, samples=6, length=24) | " if pass_ == "gptq" else ""
        do(models("mixtral"), tmp_path / scheme, f"{begin}quantize.{pass_}(scheme={scheme})")
        dense_view, found = DenseView(open_checkpoint(tmp_path / scheme)), dict[str, set[float]]()
        for name in dense_view.weights:
            q = dense_view.qtensor(name)
            assert q is not None
            found.setdefault(together(name), set()).add(float(q.scale if q.tensor_scale is None else q.tensor_scale))
        assert {len(scales) for scales in found.values()} == {1}
        assert len(found) < len(dense_view.weights)
        assert len({scale for scales in found.values() for scale in scales}) > 3


@pytest.mark.parametrize("scheme", ["w8a8", "fp8-afp8"])
def test_activations_are_rounded_per_token(scheme: str) -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None]
    found = rounded_inputs(x, Scheme.parse(scheme))
    for token, theirs in zip(found.flatten(0, 1), x.flatten(0, 1), strict=True):
        s = float(theirs.abs().max()) / (127.5 if scheme == "w8a8" else 448)
        step = (token - theirs).abs() / s
        assert float(step.max()) <= (0.501 if scheme == "w8a8" else 16.01)
        assert float((token - theirs).norm() / theirs.norm()) < (0.012 if scheme == "w8a8" else 0.03)
    zero = rounded_inputs(torch.zeros(2, 64), Scheme.parse(scheme))
    assert not bool(zero.any())


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4-aasym", "mxfp4-amxfp4", "fp8-afp8"])
def test_what_eval_measures_has_rounded_activations(models: Any, tmp_path: Path, scheme: str) -> None:
    """The forward that goes block by block computes what the whole model does, packed or not."""
    for name, line in (("codes", f"quantize.rtn(scheme={scheme})"), ("packed", f"quantize.rtn(scheme={scheme}) | pack")):
        do(models("wide"), tmp_path / name, line)
        ids = load_file(ready_inputs())["input_ids"]
        with torch.no_grad():
            whole = build(open_checkpoint(tmp_path / name))(input_ids=ids, use_cache=False).logits
            found = next(Forward(open_checkpoint(tmp_path / name)).logits([ids]))
        torch.testing.assert_close(found.view_as(whole), whole, rtol=0, atol=0)


def test_gptq_goes_on_with_rounded_activations(models: Any, tmp_path: Path) -> None:
    begin = f"calibrate(data={ready_inputs()}, samples=6, length=24)"
    for scheme in ("w4a16g32", "w4a8g32"):
        do(models("llama"), tmp_path / scheme, f"{begin} | quantize.gptq(scheme={scheme})")
    first, second = (DenseView(open_checkpoint(tmp_path / scheme)) for scheme in ("w4a16g32", "w4a8g32"))
    for name, same in (("model.layers.0.self_attn.q_proj.weight", True), ("model.layers.1.self_attn.q_proj.weight", False)):
        a, b = first.qtensor(name), second.qtensor(name)
        assert a is not None
        assert b is not None
        # What the first layer reads is not rounded yet; what the second reads has come through rounded ones.
        assert torch.equal(a.codes, b.codes) == same


def test_a_sweep_measures_what_divides_the_scales_of_inputs(models: Any, tmp_path: Path) -> None:
    """The number is that of what the weight reads, shared by those that read the same; a pass without tokens says that it is 1."""
    begin = f"calibrate(data={ready_inputs()}, samples=6, length=24)"
    do(models("wide"), tmp_path / "gptq", f"{begin} | quantize.gptq(scheme=nvfp4-anvfp4) | pack(format=native)")
    told = do(models("wide"), tmp_path / "rtn", "quantize.rtn(scheme=nvfp4-anvfp4)").manifest
    dense_view, plain = (DenseView(open_checkpoint(tmp_path / name)) for name in ("gptq", "rtn"))
    found = {name: dense_view.qtensor(name).input_scale for name in dense_view.weights}  # type: ignore[union-attr]
    block = "model.layers.0.self_attn"
    assert {float(found[f"{block}.{name}_proj.weight"]) for name in "qkv"} == {float(found[f"{block}.q_proj.weight"])}  # type: ignore[arg-type]
    assert len({float(part) for part in found.values() if part is not None}) > 3
    seen: list[torch.Tensor] = []
    model = load(models("wide"), dtype=torch.float32)
    hook = model.get_submodule(f"{block}.q_proj").register_forward_pre_hook(lambda _, given: seen.append(given[0].abs().max()))
    with torch.no_grad():
        model(load_file(ready_inputs())["input_ids"])
    hook.remove()
    assert 448 * 6 / float(found[f"{block}.q_proj.weight"]) == pytest.approx(float(seen[0]), rel=0.02)  # type: ignore[arg-type]
    assert {float(plain.qtensor(name).input_scale) for name in plain.weights} == {1.0}  # type: ignore[arg-type, union-attr]
    assert any(note.what == "uncalibrated" and note.count == len(plain.weights) for note in told.notes)
    # What runs packed rounds as the simulation does.
    simulated, runs = build(open_checkpoint(tmp_path / "gptq"), rounded=False), compress.load(tmp_path / "gptq", "float32")
    for path, module in runs.named_modules():
        if isinstance(module, PackedLinear):
            x = torch.randn(3, 5, module.in_features, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(module(x), simulated.get_submodule(path)(x), rtol=1e-4, atol=1e-4)


def test_scales_that_can_move_are_trained_and_others_refused(models: Any, tmp_path: Path) -> None:
    batch = f"calibrate(data={ready_inputs()}, samples=6, length=24)"
    train = "distill.logits(targets=linear, batch=2, micro_batch=2)"
    for scheme in ("nf4g32", "fp8-block", "fp8-afp8"):
        out = tmp_path / scheme
        do(models("wide"), out, f"{batch} | quantize.rtn(scheme={scheme}) | {train}")
        before, after = (DenseView(open_checkpoint(place)) for place in (step_of(out, "quantize.rtn"), out))
        for name in before.weights:
            a, b = before.qtensor(name), after.qtensor(name)
            assert a is not None
            assert b is not None
            assert torch.equal(a.codes, b.codes)
            assert a.scale.dtype == b.scale.dtype
        moved = [not torch.equal(before.qtensor(n).scale, after.qtensor(n).scale) for n in before.weights]  # type: ignore[union-attr]
        assert sum(moved) > len(moved) // 2
    for scheme in ("mxfp4", "nvfp4", "fp4g32-m1"):
        with pytest.raises(CoverageError, match="none can be moved"):
            do(models("wide"), tmp_path / scheme, f"{batch} | quantize.rtn(scheme={scheme}) | {train}")


@pytest.mark.parametrize("scheme", ["fp8", "fp8-tensor", "fp8-block", "nf4g48", "fp4g48"])
def test_the_gradient_of_a_scale_is_that_of_what_it_means(models: Any, tmp_path: Path, scheme: str) -> None:
    do(models("wide"), tmp_path / "out", f"quantize.rtn(scheme={scheme}, ragged=divide)")
    student = Student(open_checkpoint(tmp_path / "out"))
    name = "model.layers.0.mlp.down_proj.weight"
    module = student.module.get_submodule(student.leaves[name].path)
    assert isinstance(module, QLinear)
    gain = module.learn()["gain"]
    grad = torch.randn(module.codes.shape, generator=torch.Generator().manual_seed(0))
    (module.weight * grad).sum().backward()
    shift = 1e-2
    q = student.dense_view.qtensor(name)
    assert q is not None
    dense = q.dequantize()
    # Every scale times its gain: the sum over gains is the derivative along all of them.
    along = float((dense * shift * grad).sum()) / shift
    assert gain.grad is not None
    assert gain.grad.shape == q.scale.shape
    assert float(gain.grad.sum()) == pytest.approx(along, rel=1e-2, abs=1e-3)


def test_fused_weights_with_rounded_activations_are_no_silent_loss(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_passes, "refuse_inputs", lambda weight, scheme: None)
    do(models("mixtral"), tmp_path / "out", "quantize.rtn(scheme=w8a8)")
    with pytest.raises(InputError, match="whose activations can be rounded"):
        build(open_checkpoint(tmp_path / "out"))
