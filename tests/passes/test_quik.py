"""QUIK: what is kept, what is rounded, and whole numbers that run as the simulation does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.errors import CompressError, CoverageError, FormatError, RecipeError
from compress.evaluate.verify import verify_bytes
from compress.kernels.dispatch import Work, ask, load_backend
from compress.kernels.native.modules import PackedLinear
from compress.kernels.native.packed import Packed, pack
from compress.layerwise.dense_view import DenseView
from compress.layerwise.model import build
from compress.numerics import qtensor
from compress.numerics.columns import kept_columns
from compress.numerics.inputs import InputRounding
from compress.numerics.qtensor import QTensor
from compress.numerics.rounding import nearest
from compress.runtime.artifact import backends
from compress.spec.weight_state import State
from families import build as build_family
from support import do, linear, load, logits, ready_inputs, tiny_llama

BEGIN = f"calibrate(data={ready_inputs()}, samples=6, length=24)"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "wide", hidden_size=128, intermediate_size=256)


def quantized(text: str, rows: int = 32, columns: int = 96, dtype: torch.dtype = torch.float32) -> QTensor:
    """A random matrix in a state with kept columns."""
    state, w = State.parse(text), torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert state.scheme is not None
    if state.columns is None:
        return nearest(w, state.scheme, dtype).q
    kept = torch.arange(columns)[5 : 5 + 2 * state.columns.count : 2]
    q = nearest(w.index_fill(1, kept, 0), state.scheme, dtype).q
    return replace(q, kept=kept_columns(w[:, kept].float(), kept, dtype, state.columns.int8))


STATES = ["codes(w4a4-aasym)+columns(16)", "codes(w4a4)+columns(32)", "codes(w4a4)+columns(16-int8)", "codes(w8a8-aasym)+columns(32-int8)", "codes(w8a8)", "codes(w3a4-aasym)"]  # fmt: skip


@pytest.mark.parametrize("text", [*STATES, "codes(w4a4g32-aasym)+columns(16)"])
def test_bytes_are_declared_and_come_back(text: str) -> None:
    weight, state, q = linear((32, 96)), State.parse(text), quantized(text, dtype=torch.bfloat16)
    assert str(state) == text
    tensors = qtensor.encode(weight, q)
    assert {s.name: (s.shape, s.nbytes) for s in qtensor.specs(weight, state)} == {
        n: (tuple(t.shape), t.numel() * t.element_size()) for n, t in tensors.items()
    }
    assert torch.equal(qtensor.decode(weight, state, tensors).dequantize(), q.dequantize())
    packed = Packed(state, 32, 96, pack(q))
    assert torch.equal(packed.unpack().dequantize(), q.dequantize())
    assert torch.equal(packed.values(torch.tensor([7, 3])), q.dequantize()[[7, 3]])


@pytest.mark.parametrize("text", STATES)
def test_whole_numbers_multiply_as_the_simulation_does(text: str) -> None:
    q = quantized(text)
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 50
    packed, runs = Packed(State.parse(text), 32, 96, pack(q)), load_backend("integers")
    held, bias = replace(packed, parts=runs.prepare(packed)), torch.randn(32)
    expected = InputRounding.of(q)(x) @ q.dequantize().T + bias
    torch.testing.assert_close(runs.linear(x, held, bias, False), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(runs.rows(held, slice(0, 16), torch.float32), q.dequantize()[:16])


@pytest.mark.parametrize("options", ["", "(kept=int8)", "(scheme=w4a4, down=w4a4, outliers=32)", "(outliers=0)"])
def test_it_is_measured_packed_and_run(wide: Path, tmp_path: Path, options: str) -> None:
    made = do(wide, tmp_path / "out", f"{BEGIN} | quantize.quik{options} | pack(format=native)").manifest
    states = {name: record.state for name, record in made.weights.items()}
    down = {state for name, state in states.items() if "down_proj" in name}
    others = {state for name, state in states.items() if "down_proj" not in name}
    expected: Any = {
        "": ("codes(w8a8)+columns(16)", "codes(w4a4-aasym)+columns(16)"),
        "(kept=int8)": ("codes(w8a8)+columns(16-int8)", "codes(w4a4-aasym)+columns(16-int8)"),
        "(scheme=w4a4, down=w4a4, outliers=32)": ("codes(w4a4)+columns(32)", "codes(w4a4)+columns(32)"),
        "(outliers=0)": ("codes(w8a8)", "codes(w4a4-aasym)"),
    }
    assert (*down, *others) == expected[options]
    simulated, model = build(open_checkpoint(tmp_path / "out"), rounded=False), compress.load(tmp_path / "out", "float32")
    assert backends(model) == {"integers": 14}
    # Module by module, because in whole models a sum in another order can put an activation on the other side of a tie.
    for runs in (model, compress.load(tmp_path / "out", "float32", backend="cpu")):
        for path, module in runs.named_modules():
            if isinstance(module, PackedLinear):
                x = torch.randn(3, 5, module.in_features, generator=torch.Generator().manual_seed(0))
                torch.testing.assert_close(module(x), simulated.get_submodule(path)(x), rtol=1e-4, atol=1e-4)
    verify_bytes(open_checkpoint(tmp_path / "out"), Context())
    do(tmp_path / "out", tmp_path / "again", "unpack | pack(format=native)")
    assert {n: str(s) for n, (_, s) in DenseView(open_checkpoint(tmp_path / "again")).weights.items()} == states


def test_it_loses_less_than_gptq_where_inputs_have_outliers(wide: Path, tmp_path: Path) -> None:
    """The norm before attention is made to write a few loud channels, whose columns are as much smaller."""
    from safetensors.torch import load_file, save_file

    source = tmp_path / "loud"
    source.mkdir()
    for path in wide.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            tensors[name][[1, 50, 90]] *= 64
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensors[name][:, [1, 50, 90]] /= 64
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    truth = logits(load(source, dtype=torch.float32))
    lost = {}
    for name, line in (("gptq", "quantize.gptq(scheme=w4a4-aasym)"), ("quik", "quantize.quik(down=w4a4-aasym)")):
        do(source, tmp_path / name, f"{BEGIN} | {line}")
        lost[name] = float((logits(build(open_checkpoint(tmp_path / name))) - truth).norm() / truth.norm())
    assert lost["quik"] < 0.5 * lost["gptq"]
    dense_view = DenseView(open_checkpoint(tmp_path / "quik"))
    q = dense_view.qtensor("model.layers.0.self_attn.q_proj.weight")
    assert q is not None
    assert q.kept is not None
    assert {1, 50, 90} <= set(q.kept.columns.tolist())


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        ("quantize.quik(scheme=w4a16g32)", RecipeError, "symmetric integers with integer activations"),
        ("quantize.quik(down=fp8-afp8)", RecipeError, "symmetric integers with integer activations"),
        ("quantize.quik(least_zero=1)", RecipeError, "no zero points"),
        ("quantize.quik(outliers=128)", CoverageError, "128 kept columns leave none of 128"),
        ("prune.wanda(sparsity=0.5) | quantize.quik", CoverageError, "would fill zeros"),
        ("quantize.quik | quantize.lorc", CoverageError, "have taken up the errors already"),
        ("quantize.quik | quantize.learned", CoverageError, "taken up the errors of the codes"),
        *((f"quantize.quik | pack(format={name})", FormatError, rf"no reader of {name} takes columns\(16\)")
          for name in ("compressed-tensors", "gptq", "awq", "gguf", "mlx", "peft")),
    ],
)  # fmt: skip
def test_refusals(wide: Path, tmp_path: Path, line: str, error: type[CompressError], said: str) -> None:
    with pytest.raises(error, match=said):
        do(wide, tmp_path / "out", f"{BEGIN} | {line}")


def test_a_conv1d_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CoverageError, match="a Conv1D are its inputs"):
        do(build_family("gpt2", tmp_path), tmp_path / "out", f"{BEGIN} | quantize.quik")


def test_scales_are_trained_beside_kept_columns(wide: Path, tmp_path: Path) -> None:
    do(wide, tmp_path / "out", f"{BEGIN} | quantize.quik | distill.logits(targets=linear, batch=2, micro_batch=2)")
    do(wide, tmp_path / "before", f"{BEGIN} | quantize.quik")
    after, before = (DenseView(open_checkpoint(tmp_path / name)) for name in ("out", "before"))
    moved = 0
    for name in before.weights:
        a, b = before.qtensor(name), after.qtensor(name)
        assert a is not None
        assert b is not None
        assert a.kept is not None
        assert b.kept is not None
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.kept.values, b.kept.values)
        moved += not torch.equal(a.scale, b.scale)
    assert moved > len(before.weights) // 2


def test_backends_that_know_of_no_kept_columns_refuse_them() -> None:
    work = Work(State.parse("codes(w8a8)+columns(16)"), 64, 64, torch.bfloat16, torch.bfloat16, "cpu")
    found, refused = ask(work)
    assert found is not None
    assert found.name == "integers"
    assert "kept columns" in refused["triton"].reason
