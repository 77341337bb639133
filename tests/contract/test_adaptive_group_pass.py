"""Groups by matrix: they end, share what readers want alike, are planned as a bound and written as decided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.architecture.weight_map import resolve
from compress.checkpoint.reader import open_checkpoint
from compress.contract.adaptive_group_pass import AdaptiveGroupPass
from compress.contract.allocator import Offer, Rest
from compress.errors import RecipeError
from compress.pipeline.plan import PlanOptions, make_plan
from compress.pipeline.resolve import resolve as resolve_recipe
from compress.spec.recipe import parse_one_liner
from compress.spec.weight_state import State, Weight
from families import build
from support import linear, load, run, tiny_llama

REST = Rest(0, 0, 0)


def adaptive(**options: Any) -> AdaptiveGroupPass:
    text = ", ".join(f"{name}={value}" for name, value in {"scheme": "w4a16g16", **options}.items())
    (pass_,) = resolve_recipe(parse_one_liner(f"quantize.rtn(granularity=adaptive, {text})"))
    assert isinstance(pass_, AdaptiveGroupPass)
    return pass_


def chosen(pass_: AdaptiveGroupPass, weights: dict[Weight, torch.Tensor]) -> list[int | None]:
    """The groups that a pass gives weights."""
    allocator = pass_.allocator()
    assert allocator is not None
    offers = [Offer(weight, allocator.offers(weight, State())) for weight in weights]
    seen = [Offer(o.weight, o.states, allocator.costs(o, v, None)) for o, v in zip(offers, weights.values(), strict=True)]
    return [state.scheme.group for state in allocator.decide(seen, REST).values() if state.scheme]


def test_the_printed_rule_always_ends_at_the_smallest_group() -> None:
    """For ranges of magnitudes it decides nothing, whatever alpha is; the mean does."""
    torch.manual_seed(0)
    for w in (torch.randn(32, 256), torch.ones(32, 256), torch.randn(32, 256) ** 5):
        for alpha in (0.5, 0.9, 0.99):
            assert chosen(adaptive(rule="paper", alpha=alpha), {linear((32, 256)): w}) == [16]
    assert chosen(adaptive(), {linear((32, 256)): torch.ones(32, 256)}) == [None]


def test_a_matrix_with_outliers_is_divided_and_a_plain_one_is_not() -> None:
    torch.manual_seed(0)
    plain, rough = torch.randn(32, 256), torch.randn(32, 256)
    rough[:, 5] *= 30
    a, b = linear((32, 256)), linear((32, 256), name="m.layers.0.o.weight")
    assert chosen(adaptive(), {a: plain, b: rough}) == [None, 16]
    # One outlier in one row of many is no mean, but it is some group.
    lone = plain.clone()
    lone[0, 0] = 100
    assert chosen(adaptive(), {a: lone}) == [None]
    assert chosen(adaptive(rule="some", alpha=0.5), {a: lone}) != [None]
    # With outliers kept beside the codes there is nothing left to divide.
    rough[:, 5] = plain[:, 5]
    rough[0, 5] = 1e6
    assert chosen(adaptive(rule="some", alpha=0.3, outliers=0.001), {a: rough}) == [None]


def test_a_smaller_alpha_never_divides_more() -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 512).exp()
    groups = [chosen(adaptive(alpha=alpha), {linear((64, 512)): w})[0] or 512 for alpha in (0.5, 0.7, 0.8, 0.85, 0.9, 1)]
    assert groups == sorted(groups, reverse=True)
    assert groups[0] == 512
    assert groups[-1] == 16


def test_what_readers_fuse_takes_the_finest_group_of_all() -> None:
    torch.manual_seed(0)
    plain, rough = torch.randn(32, 256), torch.randn(32, 256)
    rough[:, 5] *= 30
    weights = {linear((32, 256), name=f"m.layers.0.self_attn.{word}_proj.weight"): plain for word in "qko"}
    weights[linear((32, 256), name="m.layers.0.self_attn.v_proj.weight")] = rough
    assert chosen(adaptive(), weights) == [16, 16, None, 16]
    assert chosen(adaptive(share="none"), weights) == [None, None, None, 16]
    # Experts whose columns halve to nothing in common take the scheme's own group.
    experts = {
        linear((32, columns), name=f"m.layers.0.experts.0.{columns}.weight", kind="expert"): torch.randn(32, columns)
        for columns in (256, 96)
    }
    assert chosen(adaptive(alpha=1), experts) == [16, 16]
    assert chosen(adaptive(alpha=1, share="none"), experts) == [16, 24]
    assert chosen(adaptive(alpha=0.5), experts) == [None, None]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("scheme=w4a16g16, alpha=0.5", "alpha: only with granularity=adaptive"),
        ("scheme=w4a16, granularity=adaptive", "a scheme with the smallest group"),
        ("scheme=mxfp4, granularity=adaptive", "a scheme with the smallest group"),
        ("scheme=w4a16g16, granularity=adaptive, ragged=divide", "ragged: only with granularity=fixed"),
        ("scheme=nf4g64, grid=paper", "symmetric integers, not nf4g64"),
    ],
)
def test_options_that_nobody_would_read_are_refused(options: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        resolve_recipe(parse_one_liner(f"quantize.rtn({options})"))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with an input of block 0's down_proj that has large weights."""
    folder = tiny_llama(tmp_path_factory.mktemp("uneven") / "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][:, 3] *= 40
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_plan_is_a_bound_and_the_run_is_exact(uneven: Path, tmp_path: Path) -> None:
    text = "quantize.rtn(scheme=w4a16g16, granularity=adaptive, alpha=0.8)"
    source = open_checkpoint(uneven)
    (bound,) = make_plan(parse_one_liner(text), source, resolve(source), PlanOptions(1)).steps
    assert [note.what for note in bound.notes if "decided" in note.what] == ["undecided"]
    result = run(uneven, tmp_path / "out", text)
    (step,) = result.plan.steps
    assert open_checkpoint(result.out).nbytes == step.payload_bytes < bound.payload_bytes
    states = {name: record.state for name, record in result.manifest.weights.items()}
    # 96 columns halve to 48 and 24.
    assert {name for name, state in states.items() if state != "codes(w4a16)"} == {"model.layers.0.mlp.down_proj.weight"}
    assert states["model.layers.0.mlp.down_proj.weight"] == "codes(w4a16g24)"
    rows = [json.loads(line) for line in (tmp_path / "out" / "allocation.jsonl").read_text().splitlines()]
    assert {row["weight"]: row["state"] for row in rows} == states
    assert run(uneven, tmp_path / "out", text).fresh is False


def test_readers_load_what_was_decided(uneven: Path, tmp_path: Path) -> None:
    run(uneven, tmp_path / "out", "quantize.rtn(scheme=w4a16g16, granularity=adaptive, alpha=0.8) | pack")
    assert torch.isfinite(next(load(tmp_path / "out").parameters()).float()).all()


def test_fused_experts_choose_together(tmp_path: Path) -> None:
    result = run(build("gpt_oss", tmp_path), tmp_path / "out", "quantize.moqe(scheme=w4a16g8, granularity=adaptive, alpha=1)")
    assert {record.state for record in result.manifest.weights.values()} == {"codes(w4a16g8)"}
