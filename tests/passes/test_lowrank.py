"""LoRC and LoftQ as passes: the dense parent, budgets, every layout of a weight, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.checkpoint.reader import open_checkpoint
from compress.errors import CompressError, CoverageError, InputError, RecipeError, UsageError
from compress.layerwise.dense_view import DenseView
from compress.layerwise.model import build
from compress.numerics import qtensor
from families import build as build_family
from support import dense_meaning, load, logits, ready_inputs, run, step_of

Source = Callable[[str], Path]
CALIBRATE = f"calibrate(data='{ready_inputs()}', samples=6)"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("families")
    return lambda name: folder / name if (folder / name).exists() else build_family(name, folder)


def errors(dense: Path, out: Path) -> dict[str, float]:
    """|W - W'| of every weight in codes, by what both directories mean."""
    source, dense_view = open_checkpoint(dense), DenseView(open_checkpoint(out))
    found = {}
    for name, (weight, _) in dense_view.weights.items():
        q = dense_view.qtensor(name)
        assert q is not None
        found[name] = float((source.read(name).float() - qtensor.as_matrix(weight, q.dequantize())).norm())
    return found


@pytest.mark.parametrize("quantizer", ["rtn(scheme=w2a16g32-asym)", "gptq(scheme=w3a16g32)", "rtn(scheme=nf2g32, outliers=0.01)",
                                       "gptq(scheme=mxfp4)", "rtn(scheme=fp8-block)"])  # fmt: skip
def test_lorc_takes_the_tail_of_what_any_quantizer_lost(quantizer: str, tiny: Path, tmp_path: Path) -> None:
    result = run(tiny, tmp_path / "out", f"{CALIBRATE} | quantize.{quantizer} | quantize.lorc(rank=6)")
    source, name = open_checkpoint(tiny), f"quantize.{quantizer.partition('(')[0]}"
    step = DenseView(open_checkpoint(step_of(tmp_path / "out", name)))
    after = errors(tiny, tmp_path / "out")
    for name in step.weights:
        q = step.qtensor(name)
        assert q is not None
        w = source.read(name).float()
        s = torch.linalg.svdvals(w - q.dequantize())
        assert after[name] == pytest.approx(float(s[6:].norm()), rel=2e-3)
        record = result.manifest.weights[name]
        assert record.error == pytest.approx(after[name] / float(w.norm()), rel=1e-4)
        assert record.output_error is None
        assert record.state.endswith("+lowrank(r6-int8)")


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_layout_of_a_weight_can_have_factors(name: str, weighted: bool, source: Source, tmp_path: Path) -> None:
    lorc = f"quantize.lorc(rank=4, weighted={str(weighted).lower()}, factors=bf16)"
    run(source(name), tmp_path / "out", f"{CALIBRATE} | quantize.rtn(scheme=w2a16g16-asym, outliers=0.01) | {lorc}")
    before, after = errors(source(name), step_of(tmp_path / "out", "quantize.rtn")), errors(source(name), tmp_path / "out")
    assert before.keys() == after.keys()
    if not weighted:
        assert all(after[n] < before[n] for n in before)
    ours = logits(build(open_checkpoint(tmp_path / "out")))
    meant = logits(load(dense_meaning(tmp_path / "out", tmp_path / "dense_view"), dtype=torch.float32))
    torch.testing.assert_close(ours, meant, rtol=0, atol=2e-6)


def test_weighted_factors_cost_outputs_less(tiny: Path, tmp_path: Path) -> None:
    start = f"{CALIBRATE} | quantize.rtn(scheme=w2a16g32-asym)"
    plain = run(tiny, tmp_path / "plain", f"{start} | quantize.lorc(rank=8, weighted=true, min_tokens=100000)").manifest
    weighted = run(tiny, tmp_path / "weighted", f"{start} | quantize.lorc(rank=8, weighted=true)").manifest
    assert any(note.what == "fallback" and note.count == len(plain.weights) for note in plain.notes)
    first = "model.layers.0.self_attn.q_proj.weight"
    a, b = plain.weights[first], weighted.weights[first]
    assert b.output_error < a.output_error  # type: ignore[operator]
    assert b.error > a.error  # type: ignore[operator]


def test_the_dense_parent_is_what_the_quantizer_read(tiny: Path, tmp_path: Path) -> None:
    """Trained on the way: not the model that the run began with."""
    recipe = f"{CALIBRATE} | distill.logits(batch=6, micro_batch=3, epochs=2, lr=1e-2) | quantize.rtn(scheme=w3a16g32) | quantize.lorc(rank=64)"
    run(tiny, tmp_path / "out", recipe)
    trained = step_of(tmp_path / "out", "distill.logits")
    assert errors(trained, tmp_path / "out")[UP] < 0.02 * errors(tiny, tmp_path / "out")[UP]


def test_codes_of_an_earlier_run_need_the_checkpoint_that_they_were_made_from(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "codes", "quantize.rtn(scheme=w2a16g32-asym)")
    with pytest.raises(InputError, match=r"set quantize\.lorc\.dense"):
        run(tmp_path / "codes", tmp_path / "out", "quantize.lorc(rank=4)")
    run(tmp_path / "codes", tmp_path / "out", f"quantize.lorc(rank=4, dense='{tiny}')")
    together = run(tiny, tmp_path / "together", "quantize.rtn(scheme=w2a16g32-asym) | quantize.lorc(rank=4)")
    digests = open_checkpoint(tmp_path / "out").manifest.digests  # type: ignore[union-attr]
    assert digests == together.manifest.digests
    assert str(tiny) not in (tmp_path / "out" / "manifest.json").read_text()
    other = tmp_path / "other"
    run(tiny, other, "prune.magnitude(sparsity=2:4)")
    with pytest.raises(InputError, match="another one"):
        run(tmp_path / "codes", tmp_path / "no", f"quantize.lorc(rank=4, dense='{other}')")
    with pytest.raises(UsageError, match="leave it out"):
        run(tiny, tmp_path / "no", f"quantize.rtn(scheme=w3a16g32) | quantize.lorc(dense='{tiny}')")


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("quantize.lorc", "nothing was rounded"),
        ("quantize.rtn(scheme=w3a16g32) | quantize.lorc | quantize.lorc", r"already codes\(w3a16g32\)\+lowrank\(r8-int8\)"),
        ("quantize.loftq(scheme=nf4g32) | quantize.rtn(scheme=w3a16g32)", "quantizing twice"),
        ("prune.magnitude(sparsity=2:4) | quantize.rtn(scheme=w3a16g32) | quantize.lorc", "fill its zeros"),
        ("prune.magnitude(sparsity=2:4) | quantize.loftq(scheme=w3a16g32)", "fill its zeros"),
        ("quantize.rtn(scheme=w3a16g32) | quantize.lorc(bpw=0.01)", "does not pay for one rank"),
        ("quantize.rtn(scheme=nvfp4, outliers=0.01)", "no outlier can be taken out of"),
        ("quantize.rtn(scheme=w3a16g32, outliers=0.01) | pack", r"outliers\(0.01\) beside codes"),
        ("quantize.loftq(scheme=w4a16g32) | pack(format=gptq)", r"lowrank\(r16\) beside codes"),
        ("quantize.loftq(scheme=w4a16g32) | pack(format=awq)", r"lowrank\(r16\) beside codes"),
    ],
)
def test_refusals(recipe: str, said: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=said):
        run(tiny, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    ["quantize.loftq(scheme=nf4g32, ranks=attention)", "quantize.loftq(scheme=nf4g32, bpw=0.5, rank=4)",
     "quantize.loftq(scheme=nf4g32, scales=frozen, outliers=0.01)",
     "quantize.rtn(scheme=nf4g32) | quantize.lorc(damping=0.1)"],
)  # fmt: skip
def test_options_that_nobody_would_read_are_refused(options: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        run(tiny, tmp_path / "out", options)


def test_ranks_go_by_the_first_selector_that_fits(tiny: Path, tmp_path: Path) -> None:
    recipe = "quantize.loftq(scheme=nf4g32, rank=3, ranks=[model.layers.0.self_attn.q_proj=70, 'attention=5'], iterations=1)"
    result = run(tiny, tmp_path / "out", recipe)
    states = {name: record.state for name, record in result.manifest.weights.items()}
    assert states["model.layers.0.self_attn.q_proj.weight"].endswith("lowrank(r64)")
    assert states["model.layers.0.self_attn.k_proj.weight"].endswith("lowrank(r5)")
    assert states[UP].endswith("lowrank(r3)")
    with pytest.raises(UsageError, match="matches at least one"):
        run(tiny, tmp_path / "no", "quantize.loftq(scheme=nf4g32, ranks=['q_proj=5'])")


@pytest.mark.parametrize("factors", ["bf16", "int8"])
def test_a_budget_of_bits_is_met(factors: str, tiny: Path, tmp_path: Path) -> None:
    plain = run(tiny, tmp_path / "plain", "quantize.rtn(scheme=w3a16g32)").manifest.weights
    held = run(
        tiny, tmp_path / "held", f"quantize.rtn(scheme=w3a16g32) | quantize.lorc(bpw=2, factors={factors})"
    ).manifest.weights
    for name, record in held.items():
        rows, columns = record.shape
        one = (8 if factors == "int8" else 16) * (rows + columns) + (32 if factors == "int8" else 0)
        assert 2 - one / (rows * columns) < record.bits - plain[name].bits <= 2


def test_loftq_keeps_no_worse_a_round_than_lorc(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "lorc", "quantize.rtn(scheme=nf2g32) | quantize.lorc(rank=8, factors=bf16)")
    run(tiny, tmp_path / "one", "quantize.loftq(scheme=nf2g32, rank=8, iterations=1)")
    run(tiny, tmp_path / "best", "quantize.loftq(scheme=nf2g32, rank=8, iterations=6)")
    lorc, one, best = (errors(tiny, tmp_path / name) for name in ("lorc", "one", "best"))
    assert lorc == one
    assert all(best[name] <= one[name] for name in one)
    assert sum(best.values()) < 0.98 * sum(one.values())


def test_skipped_weights_are_allowed_one_by_one(tiny: Path, tmp_path: Path) -> None:
    result = run(
        tiny, tmp_path / "out", "quantize.rtn(scheme=w3a16g32, targets=mlp) | quantize.lorc(rank=2)", allow_skips=("self_attn",)
    )
    assert all(record.state.endswith("lowrank(r2-int8)") for record in result.manifest.weights.values())
    with pytest.raises(CoverageError, match="nothing was rounded"):
        run(tiny, tmp_path / "no", "quantize.rtn(scheme=w3a16g32, targets=mlp) | quantize.lorc(rank=2)")


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_outliers_are_the_largest_weights_bit_by_bit(name: str, quantizer: str, source: Source, tmp_path: Path) -> None:
    run(source(name), tmp_path / "out", f"{CALIBRATE} | quantize.{quantizer}(scheme=w2a16g16-asym, outliers=0.02)")
    dense_view, dense = DenseView(open_checkpoint(tmp_path / "out")), open_checkpoint(source(name))
    plain = run(source(name), tmp_path / "plain", f"{CALIBRATE} | quantize.{quantizer}(scheme=w2a16g16-asym)").manifest.weights
    held = open_checkpoint(tmp_path / "out").manifest.weights  # type: ignore[union-attr]
    for key, (weight, _) in dense_view.weights.items():
        q, w = dense_view.qtensor(key), qtensor.as_matrix(weight, dense.read(key))
        assert q is not None
        assert q.outliers is not None
        size = weight.rows * weight.columns
        for own, meant in zip(w.reshape(-1, size), q.dequantize().reshape(-1, size), strict=True):
            kept = own.float().abs().argsort(descending=True, stable=True)[: round(0.02 * size)]
            assert torch.equal(meant[kept], own[kept].float())
        # GPTQ trades errors of weights for those of outputs.
        word = "error" if quantizer == "rtn" else "output_error"
        assert getattr(held[key], word) < getattr(plain[key], word)
