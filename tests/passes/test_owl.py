"""OWL: shares of zeros by block against the formula, decided once, kept beside the step, exact in bytes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress.checkpoint.reader import open_checkpoint
from compress.errors import CoverageError, RecipeError
from compress.numerics.owl import outlier_share, shares
from compress.spec.weight_state import State
from families import build
from support import do, load, ready_inputs, run, tiny_llama

CALIBRATE = f"calibrate(data='{ready_inputs()}', samples=6)"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks, of which each has more large weights than the one before."""
    source = tiny_llama(tmp_path_factory.mktemp("uneven") / "llama", num_hidden_layers=3)
    tensors = load_file(source / "model.safetensors")
    for block in (1, 2):
        tensors[f"model.layers.{block}.mlp.gate_proj.weight"].view(-1)[: 20 * block] *= 50
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 10**9)), min_size=1, max_size=40), st.floats(0.2, 0.8))
def test_the_mean_is_the_share_that_was_asked_for(blocks: list[tuple[float, int]], p: float) -> None:
    """Weighted by size; for equal sizes that is the paper's mean. No block keeps nothing or everything."""
    outliers, sizes = zip(*blocks, strict=True)
    found = shares(outliers, sizes, p, 0.08)
    mean = sum(share * size for share, size in zip(found, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(p, abs=1e-6)
    assert all(0 < share < 1 for share in found)
    assert max(found) - min(found) <= 0.16 + 1e-6
    by_outliers = sorted(zip(outliers, found, strict=True))
    assert all(b[1] <= a[1] + 1e-6 for a, b in pairwise(by_outliers)), "more outliers, more kept"


def test_outliers_are_counted_over_all_matrices_of_a_block() -> None:
    scores = [torch.ones(4, 10), torch.ones(4, 10).index_fill_(1, torch.tensor([0]), 30)]
    assert outlier_share(lambda: scores, 5) == pytest.approx(100 * 4 / 80)


def test_shares_are_those_of_the_formula(uneven: Path, tmp_path: Path) -> None:
    """By hand, from inputs of the unpruned model in transformers."""
    do(uneven, tmp_path / "out", f"{CALIBRATE} | prune.wanda(sparsity=0.6, owl=true, owl_lambda=0.1)")
    model, inputs = load(uneven, dtype=torch.float32), {}
    for path, module in model.named_modules():
        if "layers" in path and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x, path=path: inputs.update({path: x[0].flatten(0, -2)}))
    with torch.no_grad():
        model(input_ids=load_file(ready_inputs())["input_ids"])
    outliers = []
    for block in range(3):
        names = [path for path in inputs if f"layers.{block}." in path]
        pooled = [model.get_submodule(n).weight.detach().abs() * inputs[n].square().mean(0).sqrt() for n in names]
        scores = torch.cat([score.flatten() for score in pooled])
        outliers.append(100 * float((scores > 5 * scores.mean()).float().mean()))
    ratios = [0.2 * (d - min(outliers)) / (max(outliers) - min(outliers)) for d in outliers]
    wanted = [0.6 + sum(ratios) / 3 - ratio for ratio in ratios]
    rows = [json.loads(line) for line in (tmp_path / "out" / "allocation.jsonl").read_text().splitlines()]
    found = {row["block"]: row["zeros"] for row in rows}
    assert [found[block] for block in range(3)] == pytest.approx(wanted, abs=2e-3)
    assert sum(row["zeros"] * row["numel"] for row in rows) / sum(row["numel"] for row in rows) == pytest.approx(0.6, abs=1e-6)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_mask_pass_takes_it_and_a_plan_stays_exact(method: str, uneven: Path, tmp_path: Path) -> None:
    recipe = f"{CALIBRATE} | prune.{method}(sparsity=0.6, owl=true)"
    result = run(uneven, tmp_path / "out", recipe)
    out, table = open_checkpoint(tmp_path / "out"), tmp_path / "out" / "allocation.jsonl"
    decided = {row["weight"]: row for row in map(json.loads, table.read_text().splitlines())}
    zeros = 0
    for name, record in result.manifest.weights.items():
        share, value = decided[name]["zeros"], out.read(name)
        sparsity = State.parse(record.state).sparsity
        assert sparsity is not None
        assert sparsity.fraction == share
        zeros += int((value == 0).sum())
    assert len({row["zeros"] for row in decided.values()}) == 3
    assert zeros / sum(row["numel"] for row in decided.values()) == pytest.approx(0.6, abs=0.01)
    assert result.plan.steps[-1].payload_bytes == out.nbytes
    assert (tmp_path / "out" / "allocation.svg").is_file()
    assert not list((tmp_path / "out.steps").glob("*.states"))
    assert run(uneven, tmp_path / "out", recipe).fresh is False


def test_experts_that_no_token_reached_have_no_say(tmp_path: Path) -> None:
    source = build("mixtral", tmp_path)
    calibrate = f"calibrate(data='{ready_inputs(1, 6)}', samples=1)"
    result = run(source, tmp_path / "out", f"{calibrate} | prune.sparsegpt(sparsity=0.5, owl=true)")
    assert any(note.what == "unrouted" for note in result.manifest.notes)
    rows = [json.loads(line) for line in (tmp_path / "out" / "allocation.jsonl").read_text().splitlines()]
    assert sum(row["zeros"] * row["numel"] for row in rows) / sum(row["numel"] for row in rows) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("sparsity=2:4, owl=true", "2:4 is the same in every block"),
        ("sparsity=0.9, owl=true", "owl_lambda: below 0.05"),
        ("sparsity=0.5, owl_m=3", "owl_m: only with owl=true"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: str, said: str, tiny: Path, tmp_path: Path) -> None:
    for method in ("magnitude", "wanda", "sparsegpt"):
        with pytest.raises(RecipeError, match=said):
            run(tiny, tmp_path / "out", f"{CALIBRATE} | prune.{method}({options})")


def test_without_tokens_or_outside_of_blocks_it_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="calibration tokens"):
        run(tiny, tmp_path / "out", "prune.magnitude(sparsity=0.5, owl=true)")
    with pytest.raises(CoverageError, match="outside of them reads"):
        run(tiny, tmp_path / "out", f"{CALIBRATE} | prune.magnitude(sparsity=0.5, owl=true, targets=head)")
