"""quantize.moqe: experts only, the paper's grid, sizes by formula, starved experts, readers, messages."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.reader import open_checkpoint
from compress.errors import InputError, RecipeError, UsageError
from compress.layerwise.dense_view import DenseView
from compress.numerics.rounding import nearest
from compress.pipeline.resolve import resolve
from compress.spec.recipe import parse_one_liner
from compress.spec.scheme import Scheme
from families import EXPERTS, build
from support import dense_meaning, load, logits, ready_inputs, run, step_of

BITS = (2, 3, 4, 8)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of four experts, one tensor each."""
    return build("mixtral", tmp_path_factory.mktemp("moe"))


def paper(a: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's quantizer, rounding for its int(), column by column of a [in, out]: (values, scales)."""
    values, scales = torch.empty_like(a), []
    for j in range(a.shape[1]):
        s = 2 * a[:, j].abs().max() / (2**bits - 1)
        most = 2 ** (bits - 1) - 1
        values[:, j] = torch.tensor([max(-most, min(most, round(float(x)))) for x in a[:, j] / s]) * s
        scales.append(s)
    return values, torch.stack(scales)


@pytest.mark.parametrize("bits", BITS)
def test_grid_is_the_papers(bits: int) -> None:
    torch.manual_seed(0)
    w = torch.randn(24, 32)
    q = nearest(w, Scheme(bits), torch.float32, least_code=1).q
    values, scales = paper(w.T, bits)
    torch.testing.assert_close(q.dequantize(), values.T)
    torch.testing.assert_close(q.scale[:, 0], scales)
    levels = q.codes.int() - q.scheme.middle
    assert int(levels.abs().max()) <= (2**bits - 1) / 2
    assert bool(((q.dequantize() - w).abs() <= q.scale / 2 * (1 + 1e-5)).all())


@pytest.mark.parametrize("factor", [-1.0, 4.0, -0.125])
@pytest.mark.parametrize("bits", BITS)
def test_scaled_weights_have_the_same_levels(bits: int, factor: float) -> None:
    """Of either sign; the full grid is not even, so a largest weight below zero has no mirror image there."""
    w = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    q, scaled = (nearest(x, Scheme(bits), torch.float32, least_code=1).q.dequantize() for x in (w, w * factor))
    torch.testing.assert_close(scaled, factor * q)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_all_that_is_no_expert_keeps_its_bits(name: str, tmp_path: Path) -> None:
    source = build(name, tmp_path)
    result = run(source, tmp_path / "out", "quantize.moqe(scheme=w3a16)")
    (note,) = [note for note in result.manifest.notes if note.what == "experts"]
    assert set(note.names) == set(result.manifest.weights)
    assert all("experts" in weight or "block_sparse_moe" in weight for weight in note.names)
    assert not any("shared" in weight for weight in note.names)
    fused = {"gpt_oss": "[in, out]", "granitemoe": "[out, in]"}
    wanted = f"{EXPERTS} experts in one tensor, each stored {fused[name]}" if name in fused else "a tensor for each expert"
    assert note.reason == wanted
    before, after = load_file(source / "model.safetensors"), open_checkpoint(tmp_path / "out")
    for weight in before.keys() - result.manifest.weights.keys():
        assert torch.equal(before[weight], after.read(weight)), weight
    dense_view = DenseView(after)
    for weight in result.manifest.weights:
        assert not torch.equal(before[weight], dense_view.dense(weight))


@pytest.mark.parametrize("bits", BITS)
def test_size_is_that_of_the_formula(bits: int, mixtral: Path, tmp_path: Path) -> None:
    """(1 - f) + f b / 16, and a scale of 16 bits for every output channel."""
    source = open_checkpoint(mixtral)
    result = run(mixtral, tmp_path / "out", f"quantize.moqe(scheme=w{bits}a16)")
    experts = [ref for name, ref in source.refs.items() if name in result.manifest.weights]
    share = sum(ref.nbytes for ref in experts) / source.nbytes
    scales = sum(2 * ref.shape[0] for ref in experts) / source.nbytes
    assert open_checkpoint(result.out).nbytes / source.nbytes == pytest.approx(1 - share + share * bits / 16 + scales, abs=1e-9)


def test_with_the_full_grid_it_is_rounding_to_nearest(mixtral: Path, tmp_path: Path) -> None:
    run(mixtral, tmp_path / "moqe", "quantize.moqe(scheme=w2a16g32, grid=full)")
    run(mixtral, tmp_path / "rtn", "quantize.rtn(scheme=w2a16g32, targets=[experts])")
    a, b = (open_checkpoint(tmp_path / name) for name in ("moqe", "rtn"))
    assert a.refs.keys() == b.refs.keys()
    for name in a.refs:
        assert torch.equal(a.read(name), b.read(name))


def test_experts_that_get_no_tokens_do_not_matter(mixtral: Path, tmp_path: Path) -> None:
    """A router that sends a token to the first or the second expert, by a sign: the others can be anything."""
    tensors = load_file(mixtral / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("block_sparse_moe.gate.weight"):
            tensor[:] = tensor[:1] * torch.tensor([[1.0], [-1.0], [0.5], [0.5]])
    config = json.loads((mixtral / "config.json").read_text()) | {"num_experts_per_tok": 1}
    found = []
    for factor in (1, 3):
        folder = tmp_path / f"source-{factor}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        other = {name: t * factor if re.search(r"experts\.[23]\.", name) else t for name, t in tensors.items()}
        save_file(other, folder / "model.safetensors", {"format": "pt"})
        run(folder, tmp_path / f"out-{factor}", "quantize.moqe(scheme=w2a16)")
        found.append(logits(load(dense_meaning(tmp_path / f"out-{factor}", tmp_path / f"dense-{factor}"))))
    assert torch.equal(*found)


def test_starved_and_unrouted_experts_are_rounded_and_counted(mixtral: Path, tmp_path: Path) -> None:
    calibrate = f"calibrate(data='{ready_inputs(1, 6)}', samples=1)"
    result = run(mixtral, tmp_path / "out", f"{calibrate} | quantize.moqe(scheme=w4a16g32, method=gptq, min_tokens=5)")
    notes = {note.what: note for note in result.manifest.notes}
    assert "fewer than 5 calibration tokens" in notes["fallback"].reason
    assert "no calibration token" in notes["unrouted"].reason
    assert len(result.manifest.weights) == 2 * 3 * EXPERTS
    unrouted, dense_view = set(notes["unrouted"].names), DenseView(open_checkpoint(result.out))
    source = DenseView(open_checkpoint(mixtral))
    for name in result.manifest.weights:
        found = (dense_view.dense(name).float() - source.dense(name).float()).norm() / source.dense(name).float().norm()
        assert found < 0.2
    assert unrouted
    assert unrouted.isdisjoint(notes["fallback"].names)


def test_with_tokens_outputs_err_less_than_without(mixtral: Path, tmp_path: Path) -> None:
    calibrate = f"calibrate(data='{ready_inputs(64, 24)}', samples=64)"
    wanted = logits(load(mixtral))
    errors = []
    recipes = {"rtn": "quantize.moqe(scheme=w2a16)", "gptq": f"{calibrate} | quantize.moqe(scheme=w2a16, method=gptq)"}
    for name, recipe in recipes.items():
        run(mixtral, tmp_path / name, recipe)
        errors.append(float((logits(load(dense_meaning(tmp_path / name, tmp_path / f"{name}-dense"))) - wanted).norm()))
    assert errors[1] < errors[0]


def test_readers_load_it(mixtral: Path, tmp_path: Path) -> None:
    run(mixtral, tmp_path / "out", "quantize.moqe(scheme=w4a16g32) | pack")
    wanted = logits(load(dense_meaning(step_of(tmp_path / "out", "quantize.moqe"), tmp_path / "dense")))
    assert torch.equal(logits(load(tmp_path / "out")), wanted)


def test_a_dense_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)a model with routed experts.*a dense one.*quantize\.rtn"):
        run(tiny, tmp_path / "out", "quantize.moqe")


def test_other_weights_are_refused(mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="self_attn"):
        run(mixtral, tmp_path / "out", "quantize.moqe(targets=[linear])")
    result = run(mixtral, tmp_path / "some", "quantize.moqe(targets=['re:.*layers.0.*experts'])")
    assert len(result.manifest.weights) == 3 * EXPERTS


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("scheme=w4a16-asym", "symmetric integers and a16, not w4a16-asym"),
        ("scheme=nf4", "symmetric integers"),
        ("scheme=w8a8", "symmetric integers and a16"),
        ("method=gptq, grid=paper", "full with method=gptq"),
        ("min_tokens=4", "only with method=gptq"),
        ("least_zero=1", "symmetric codes have no zero point"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        resolve(parse_one_liner(f"quantize.moqe({options})"))
