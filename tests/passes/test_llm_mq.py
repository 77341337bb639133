"""quantize.llm_mq: what a rounding costs, how a budget is spent, tables, crashes, and what is told before the run."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import compress.demo
import forked
from allocations import CALIBRATE, SCHEMES, mq, rows
from compress.architecture.weight_map import resolve as resolve_names
from compress.checkpoint.reader import open_checkpoint
from compress.checkpoint.writer import Writer
from compress.contract.allocator import Offer, read_table
from compress.contract.discover import load_pass
from compress.errors import CoverageError, InputError, RecipeError, UsageError
from compress.evaluate.perplexity_kl import compare
from compress.executors import gradients
from compress.layerwise.dense_view import DenseView
from compress.layerwise.eval_windows import token_windows
from compress.numerics.rounding import nearest
from compress.pipeline import plan
from compress.spec.recipe import parse_one_liner
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State
from families import build
from support import dense_meaning, do, linear, load, logits, ready_inputs, run, step_of, tiny_llama, tree

TEXT = Path(compress.demo.__file__).parent / "text"


def bits_of(table: dict[str, dict[str, Any]]) -> float:
    taken = sum(row["numel"] * State.parse(row["state"]).scheme.bits for row in table.values())
    return taken / sum(row["numel"] for row in table.values())


@pytest.mark.parametrize(("mode", "felt"), [
    ("paper", lambda g, d: abs((g * d).sum())), ("abs", lambda g, d: (g * d).abs().sum()), ("fisher", lambda f, d: (f * d.square()).sum()),
])  # fmt: skip
def test_costs_are_sums_over_gradient_times_error(mode: str, felt: Any, tiny: Path, tmp_path: Path) -> None:
    """By plain autograd, for fisher one sample at a time, and by rounding once more."""
    do(tiny, tmp_path / "out", mq(f"bits=3, mode={mode}, method=rtn, clip=none"))
    model, ids = load(tiny, dtype=torch.float32), load_file(ready_inputs())["input_ids"]
    slopes: dict[str, Any] = {}
    for part in ids.split(1 if mode == "fisher" else len(ids)):
        model.zero_grad()
        (model(input_ids=part, labels=part).loss * len(part) / len(ids)).backward()
        for name, parameter in model.named_parameters():
            slopes[name] = slopes.get(name, 0) + (parameter.grad.square() if mode == "fisher" else parameter.grad)
    for name, row in rows(tmp_path / "out").items():
        w = model.get_parameter(name)
        for scheme in SCHEMES:
            q = nearest(w.detach().bfloat16(), Scheme.parse(scheme), torch.bfloat16).q
            wanted = float(felt(slopes[name], q.dequantize().bfloat16().float() - w.detach()))
            assert row["costs"][f"codes({scheme})"] == pytest.approx(wanted, rel=2e-3, abs=1e-7)


def test_in_bfloat16_costs_are_nearly_the_same(tiny: Path, tmp_path: Path) -> None:
    """Batches in bfloat16 add to gradients in fp32."""
    for dtype in ("float32", "bfloat16"):
        do(tiny, tmp_path / dtype, mq("bits=3, mode=abs"), dtype=dtype)
    exact, found = (rows(tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    for name, row in exact.items():
        assert found[name]["costs"] != row["costs"]
        assert found[name]["costs"] == pytest.approx(row["costs"], rel=0.05)


def test_large_matrices_are_felt_band_by_band(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts, bands that do not divide the rows, and a scheme with a scale for the whole matrix."""
    cls = load_pass("quantize.llm_mq")
    pass_ = cls(schemes=["w3a16g32", "nvfp4", "fp8-tensor", "w8a16"], bits=4)
    w, g = torch.randn(2, 300, 64).bfloat16(), torch.randn(2, 300, 64)
    offer = Offer(linear((2, 300, 64), kind="expert"), tuple(State(scheme) for scheme in pass_.schemes))
    whole = pass_.costs(offer, w, g)
    monkeypatch.setattr(sys.modules[cls.__module__], "_BAND", 1)
    assert pass_.costs(offer, w, g) == pytest.approx(whole, rel=1e-5)
    assert whole[0] > whole[1] > whole[2] > whole[3] > 0


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_budgets_hold_and_a_large_one_takes_the_largest(method: str, tiny: Path, tmp_path: Path) -> None:
    for number, bits in enumerate((2, 2.4, 3, 3.3, 4, 5)):
        run(tiny, tmp_path / f"{number}", mq(f"bits={bits}, method={method}"))
        found = bits_of(rows(tmp_path / f"{number}"))
        assert bits - 0.34 < found <= bits if bits <= 4 else found == 4


def test_bytes_are_those_of_the_whole_checkpoint(tiny: Path, tmp_path: Path) -> None:
    numel = sum(weight.numel for weight in resolve_names(open_checkpoint(tiny)).weights)
    for bpw in (5.7, 6.2, 7.0):
        result = run(tiny, tmp_path / f"{bpw}", mq(f"bpw={bpw}, method=rtn"))
        assert bpw - 0.4 < result.plan.steps[-1].payload_bytes * 8 / numel <= bpw
    for size in (61_000, 66_000, 70_000):
        result = run(tiny, tmp_path / f"{size}", mq(f"size={size}, method=rtn", ("w2a16g32", *SCHEMES[1:])))
        step = result.plan.steps[-1]
        files = [path for path in (tmp_path / f"{size}").iterdir() if path.suffix == ".safetensors" and "calib" not in path.name]
        written = sum(path.stat().st_size for path in files) + (tmp_path / f"{size}" / "config.json").stat().st_size
        assert size - 4_000 < written == step.disk_bytes <= size


@pytest.mark.parametrize(
    ("budget", "least"), [("bits=1.9", "2 at least"), ("bpw=2", r"5\.\d+ at least"), ("size=10kB", r"60,\d+ at least")]
)
def test_a_budget_that_nothing_fits_is_refused_before_the_run(budget: str, least: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=least):
        run(tiny, tmp_path / "out", mq(budget))
    assert not (tmp_path / "out.steps").exists()


@pytest.mark.parametrize("options", ["", "bits=3, bpw=4", "bits=3, reuse=x", "size=many"])
def test_one_budget_is_given(options: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"one of bits, bpw and size|no budget beside reuse|a size such as"):
        run(tiny, tmp_path / "out", mq(options))


@pytest.mark.parametrize(("options", "shared"), [("", True), (", fused=false, experts=own", False), (", experts=block", True)])
def test_what_readers_fuse_shares_a_scheme(options: str, shared: bool, tmp_path: Path) -> None:
    run(build("mixtral", tmp_path), tmp_path / "out", mq(f"bits=3.05, method=rtn{options}"))
    groups: dict[str, set[str]] = defaultdict(set)
    for name, row in rows(tmp_path / "out").items():
        attention = name.rpartition("self_attn.")[0] + "qkv" if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj") else name
        block = "" if "block" not in options else name.split(".")[2]
        groups[f"experts {block}" if "experts" in name else attention].add(row["state"])
    assert (max(map(len, groups.values())) == 1) is shared
    assert bits_of(rows(tmp_path / "out")) <= 3.05


def test_the_plan_is_an_upper_bound_until_it_is_decided(tiny: Path, tmp_path: Path) -> None:
    source, recipe = open_checkpoint(tiny), parse_one_liner(mq("bits=3, method=rtn"))
    before = plan.make_plan(recipe, source, resolve_names(source), plan.PlanOptions(2))
    (note,) = [note for note in before.steps[-1].notes if note.what == "undecided"]
    assert "upper bound" in note.reason
    assert note.count == 14
    assert before.scratch_bytes > 0
    result = run(tiny, tmp_path / "out", mq("bits=3, method=rtn"))
    step = result.plan.steps[-1]
    assert step.payload_bytes < before.steps[-1].payload_bytes
    notes = {note.reason: note.count for note in result.manifest.notes if note.what == "decided"}
    assert sum(notes.values()) == 14
    assert len(notes) > 1
    again = run(tiny, tmp_path / "out", mq("bits=3, method=rtn"))
    assert (again.fresh, again.plan.steps[-1].payload_bytes) == (False, step.payload_bytes)


def test_a_table_is_reused_and_planned_exactly(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "first", mq("bits=3, method=rtn"))
    table = tmp_path / "first" / "allocation.jsonl"
    reused = f"quantize.llm_mq(reuse='{table}', method=rtn)"
    source = open_checkpoint(tiny)
    planned = plan.make_plan(parse_one_liner(reused), source, resolve_names(source), plan.PlanOptions(2)).steps[-1]
    result = run(tiny, tmp_path / "second", reused)
    assert result.plan.steps[-1].shards == planned.shards
    assert {n: str(s) for n, s in planned.after.items() if s.scheme} == {
        n: r["state"] for n, r in rows(tmp_path / "first").items()
    }
    one, two = (DenseView(open_checkpoint(tmp_path / name)) for name in ("first", "second"))
    assert all(torch.equal(one.dense(name), two.dense(name)) for name in one.logical)
    assert str(tmp_path) not in result.manifest.to_text()
    assert read_table(tmp_path / "second" / "allocation.jsonl") == read_table(table)

    table.write_text(table.read_text().replace('w2a16g32-asym)",', 'w3a16g32-asym)",'))
    assert run(tiny, tmp_path / "third", reused).manifest.lineage[-1].id != result.manifest.lineage[-1].id
    lines = table.read_text().splitlines(keepends=True)
    for text, error, message in (
        ("".join(lines[1:]), CoverageError, "has no scheme for it"),
        ("not a table\n", InputError, "a weight and its state"),
        ("".join([*lines, lines[0].replace("layers.0", "layers.7")]), InputError, "among 1 that are not"),
    ):
        table.write_text(text)
        with pytest.raises(error, match=message):
            run(tiny, tmp_path / "fourth", reused)
    with pytest.raises(InputError, match="a readable file"):
        run(tiny, tmp_path / "fourth", "quantize.llm_mq(reuse=nowhere.jsonl, method=rtn)")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_outliers_stand_beside_two_bits_only_and_cost_nothing(method: str, tiny: Path, tmp_path: Path) -> None:
    """Exactly as many as are told, bit-equal to the source, in the bytes of the plan, and in a table that is reused."""
    run(tiny, tmp_path / "without", mq(f"bits=3, mode=abs, method={method}"))
    result = run(tiny, tmp_path / "out", mq(f"bits=2.6, mode=abs, outliers=0.01, method={method}"))
    without, table, source = rows(tmp_path / "without"), rows(tmp_path / "out"), open_checkpoint(tiny)
    two = {name for name, row in table.items() if row["state"].startswith("codes(w2")}
    assert two == {name for name, row in table.items() if "outliers(0.01)" in row["state"]}
    assert 0 < len(two) < len(table)
    dense_view, small = DenseView(open_checkpoint(tmp_path / "out")), f"codes({SCHEMES[0]})"
    for name, row in table.items():
        assert row["costs"][f"{small}+outliers(0.01)"] < without[name]["costs"][small]
        assert row["costs"][f"codes({SCHEMES[1]})"] == without[name]["costs"][f"codes({SCHEMES[1]})"]
    for name in two:
        w, got = source.read(name), dense_view.dense(name)
        # Of equal magnitudes at the edge, any may be kept.
        least = w.flatten().abs().topk(round(0.01 * w.numel())).values[-1]
        assert torch.equal(got[w.abs() > least], w[w.abs() > least])
    reused = f"{CALIBRATE} | quantize.llm_mq(reuse='{tmp_path / 'out' / 'allocation.jsonl'}', method={method})"
    again = run(tiny, tmp_path / "again", reused)
    assert again.plan.steps[-1].after == result.plan.steps[-1].after


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_crash_while_weights_are_written_costs_no_second_sweep(
    method: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = mq(f"bits=3, method={method}")
    run(tiny, tmp_path / "whole", recipe)
    written = []

    def crash(self: Writer, weight: str, *rest: Any) -> None:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(weight)
        record(self, weight, *rest)

    record = Writer.record
    monkeypatch.setattr(Writer, "record", crash)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(gradients.GradientSweep, "run", lambda *_: pytest.fail("gradients were computed again"))
    recorded = []
    monkeypatch.setattr(Writer, "record", lambda self, weight, *rest: [recorded.append(weight), record(self, weight, *rest)][1])
    run(tiny, tmp_path / "out", recipe)
    assert not set(recorded) & set(written)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "out.steps").iterdir()} == {"lock", step_of(tmp_path / "out", "calibrate").name}


def test_two_processes_decide_as_one(tmp_path: Path) -> None:
    """Their gradients add up in another order, so that costs may differ in the last digit."""
    source = build("mixtral", tmp_path)
    for ranks in (1, 2):
        for method in ("rtn", "gptq"):
            deciding = mq(f"bits=3, experts=own, method={method}").partition(" | ")[2]
            passes = f"calibrate(data='{ready_inputs(360)}', samples=360) | {deciding}"
            done = forked.compress(
                "run", source, tmp_path / f"{method}-{ranks}", "-p", passes, "--threads", 1, "--quiet", ranks=ranks
            )
            assert done.returncode == 0, done.stderr
    for method in ("rtn", "gptq"):
        one, two = (tmp_path / f"{method}-{ranks}" for ranks in (1, 2))
        assert rows(one).keys() == rows(two).keys()
        for name, row in rows(one).items():
            assert row["costs"] == pytest.approx(rows(two)[name]["costs"], rel=1e-4), (method, name)
        assert (one / "canonical.safetensors").read_bytes() == (two / "canonical.safetensors").read_bytes(), method
        assert len(list((tmp_path / f"{method}-2.steps").iterdir())) == 2


def test_a_later_step_starts_from_what_was_decided(tiny: Path, tmp_path: Path) -> None:
    """Packing, and a run whose quantized step is there already."""
    recipe = mq("bits=3, method=rtn, least_zero=1") + " | pack(format=gptq)"
    result = run(tiny, tmp_path / "out", recipe)
    assert step_of(tmp_path / "out", "quantize.llm_mq").joinpath("allocation.svg").is_file()
    assert not (tmp_path / "out" / "allocation.jsonl").exists()
    sizes = [step.payload_bytes for step in result.plan.steps]
    assert [
        sum(ref.nbytes for ref in open_checkpoint(path).refs.values())
        for path in (step_of(tmp_path / "out", "quantize.llm_mq"), tmp_path / "out")
    ] == sizes[1:]
    again = run(tiny, tmp_path / "out", recipe)
    assert (again.fresh, [step.payload_bytes for step in again.plan.steps]) == (False, sizes)


def test_embeddings_are_decided_on_and_tied_ones_once(tmp_path: Path) -> None:
    result = run(build("tied", tmp_path), tmp_path / "out", mq("bits=3, method=rtn, targets=[linear, embeddings]"))
    assert "model.embed_tokens.weight" in rows(tmp_path / "out")
    assert result.manifest.coverage["transformed"] == 15
    assert torch.isfinite(logits(load(dense_meaning(tmp_path / "out", tmp_path / "dense")))).all()


def test_a_model_that_predicts_no_next_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="predicts the next token"):
        run(build("bert", tmp_path), tmp_path / "out", mq("bits=3, method=rtn"))


def test_tokens_are_asked_for(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="calibration tokens"):
        run(tiny, tmp_path / "out", "quantize.llm_mq(bits=3, method=rtn)")


def test_the_plot_has_every_kind_of_weight(tmp_path: Path) -> None:
    from compress.plots import allocation

    run(tiny_llama(tmp_path / "model", num_hidden_layers=3), tmp_path / "out", mq("bits=3, method=rtn"))
    text = (tmp_path / "out" / "allocation.svg").read_text()
    assert all(f"model.layers.*.{part}" in text for part in ("self_attn.q_proj", "mlp.down_proj"))
    assert "bits per weight, scales included: 3.7" in text
    with pytest.raises(ValueError, match="no rows"):
        allocation(tmp_path / "x.svg", [], "")


@pytest.mark.slow
def test_gradients_beat_a_uniform_scheme_of_the_same_size(demo_model: Path, tmp_path: Path) -> None:
    """On trained weights, rounded by either method; and the signed sum of the paper does not."""

    def kl(recipe: str, out: Path) -> float:
        texts = f"calibrate(data='{TEXT / 'calibration.jsonl'}', samples=32, length=256)"
        run(demo_model, out, f"{texts} | {recipe}")
        windows = token_windows(demo_model, TEXT / "evaluation.jsonl", 256, 4096)
        return compare(open_checkpoint(demo_model), open_checkpoint(out), windows).kl.value

    found = {
        mode: kl(mq(f"bits=3, mode={mode}").partition(" | ")[2], tmp_path / mode) for mode in ("paper", "abs", "fisher", "kl")
    }
    uniform = kl("quantize.gptq(scheme=w3a16g32-asym)", tmp_path / "uniform")
    assert max(found["fisher"], found["abs"], found["kl"]) < uniform
    # What readers fuse differs most: values are worth more bits than queries.
    assert kl(mq("bits=3, mode=kl, fused=false").partition(" | ")[2], tmp_path / "own") < 0.97 * found["kl"]
    assert max(found["fisher"], found["abs"]) < found["paper"]
