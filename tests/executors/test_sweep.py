"""The sweep: what each weight is calibrated on, crashes, budgets, processes, and what it refuses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.reader import open_checkpoint
from compress.contract.discover import load_pass
from compress.errors import CoverageError, RecipeError, UsageError
from compress.executors import sweep
from compress.layerwise.batch_walk import BatchWalk
from compress.layerwise.dense_view import DenseView
from compress.numerics.masks import keep_best
from compress.spec.sparsity import Sparsity
from families import FAMILIES, build, inputs_for
from forked import compress
from support import SHARED, dense_meaning, do, goes_on, load, ready_inputs, step_of, tiny_llama, tree

CALIBRATE = "calibrate(data='{}', samples={})"
GPTQ = "quantize.gptq(scheme=w4a16g32, ragged=divide)"
RESIDUAL = "quantize.gptq(scheme=w4a16g32, ragged=divide, correct=residual)"
SMOOTH = ("quantize.smooth(scheme=w3a16g16)", "quantize.smooth(method=smoothquant)")
WATCHED = [name for name in FAMILIES if name != "llama4"]


def watch(model: torch.nn.Module, found: dict[str, torch.Tensor]) -> None:
    """Keeps the first input of every module."""
    for path, module in model.named_modules():

        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            found.setdefault(path, next(iter((*args, *kwargs.values())), None))

        module.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("name", WATCHED)
def test_every_weight_is_calibrated_on_what_it_reads_in_the_finished_model(
    name: str, source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands before a weight is solved before it, so its statistic is that of the model that comes out.

    That holds inside blocks, from encoder to decoder, and for experts, each on its own tokens.
    """
    wanda, seen = load_pass("prune.wanda"), {}
    solve = wanda.solve

    def spy(self: Any, jobs: Any, prepared: torch.Tensor) -> Any:
        seen.update({(job.weight.name, job.value.data_ptr()): (job.weight, prepared) for job in jobs})
        return solve(self, jobs, prepared)

    monkeypatch.setattr(wanda, "solve", spy)
    data = inputs_for(name, tmp_path)
    result = do(source(name), tmp_path / "out", f"{CALIBRATE.format(data, 5)} | prune.wanda(sparsity=0.5)")
    calibrated = FAMILIES[name].linears - FAMILIES[name].left
    assert result.manifest.coverage["transformed"] == calibrated
    wanted = {weight.name for weight, _ in seen.values()}
    assert len(wanted) == calibrated

    model, found = load(tmp_path / "out", dtype=torch.float32), {}
    watch(model, found)
    with torch.no_grad():
        from compress.corpus import Corpus
        from compress.layerwise.batches import cut

        (batch,) = cut(
            Corpus.load(step_of(tmp_path / "out", "calibrate") / "calibration.safetensors").tensors, model, 0, 1, torch.float32
        )
        model(**batch.inputs)
    compared = 0
    for weight, rms in seen.values():
        if weight.kind == "linear":
            x = found[weight.module].reshape(-1, rms.shape[0])
            torch.testing.assert_close(rms, x.square().mean(0).sqrt(), rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared == sum(weight.kind == "linear" for weight, _ in seen.values()) > 0


@pytest.mark.parametrize("route", ["router", "all"])
def test_experts_see_their_own_tokens_or_all(route: str, source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtral's first block against its router, run by hand."""
    wanda, seen = load_pass("prune.wanda"), {}
    solve = wanda.solve
    monkeypatch.setattr(wanda, "solve", lambda s, jobs, p: [seen.update({j.weight.name: p for j in jobs}), solve(s, jobs, p)][1])
    data = ready_inputs(5)
    do(source("mixtral"), tmp_path / "out", f"{CALIBRATE.format(data, 5)} | prune.wanda(sparsity=0.5, route={route})")
    model, found = load(tmp_path / "out", dtype=torch.float32, experts_implementation="eager"), {}
    layer = model.model.layers[0].mlp
    watch(model, found)
    with torch.no_grad():
        model(input_ids=load_file(data)["input_ids"])
        x, experts = found["model.layers.0.mlp"].reshape(-1, 64), layer.experts
        _, _, chosen = layer.gate(x)
        for e in range(experts.num_experts):
            mine = x[(chosen == e).any(-1)] if route == "router" else x
            gate, up = (mine @ experts.gate_up_proj[e].T).chunk(2, dim=-1)
            middle = experts.act_fn(gate) * up
            for part, inputs in (("w1", mine), ("w3", mine), ("w2", middle)):
                rms = seen[f"model.layers.0.block_sparse_moe.experts.{e}.{part}.weight"]
                torch.testing.assert_close(rms, inputs.square().mean(0).sqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_with_route_all_every_expert_has_all_tokens_and_outputs_stay(
    name: str, source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where statistics do not matter, for all is rounded to nearest, blocks hand the same bits on with both routes."""
    gptq, seen, outputs = load_pass("quantize.gptq"), list[int](), list[torch.Tensor]()
    model, prepare, calibrate = source(name), gptq.prepare, CALIBRATE.format(ready_inputs(5), 5)
    monkeypatch.setattr(gptq, "prepare", lambda s, statistic: [seen.append(statistic.tokens), prepare(s, statistic)][1])
    hand_on = BatchWalk.hand_on

    def spy(self: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).clone())
        hand_on(self, output)

    monkeypatch.setattr(BatchWalk, "hand_on", spy)
    written, handed = [], []
    for route in ("router", "all"):
        seen.clear()
        outputs.clear()
        options = f"scheme=w4a16g32, targets=[linear, experts], min_tokens=1000000, route={route}"
        do(model, tmp_path / route, f"{calibrate} | quantize.gptq({options})")
        written.append(load_file(tmp_path / route / "canonical.safetensors"))
        handed.append(tuple(outputs))
    assert set(seen) == {5 * 24}, "linears as ever, and each of the experts"
    assert len(handed[0]) == len(handed[1]) >= 2
    assert all(map(torch.equal, *handed))
    assert not [key for key, part in written[0].items() if not torch.equal(part, written[1][key])]


def test_a_route_that_nothing_takes_is_refused(source: Any, tmp_path: Path) -> None:
    for options in ("targets=attention", "skip=experts"):
        with pytest.raises(UsageError, match=r"prune\.wanda\.route.*\n.*all where routed experts are calibrated"):
            do(
                source("mixtral"),
                tmp_path / "out",
                f"{CALIBRATE.format(ready_inputs(5), 5)} | prune.wanda(sparsity=0.5, route=all, {options})",
            )


def test_wanda_is_what_its_paper_says(source: Any, tmp_path: Path) -> None:
    """The first weight of a model against the formula, by hand: nothing before it has changed."""
    data = ready_inputs(5)
    do(source("llama"), tmp_path / "out", f"{CALIBRATE.format(data, 5)} | prune.wanda(sparsity=0.5)")
    model = load(source("llama"), dtype=torch.float32)
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(load_file(data)["input_ids"]))
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    scores = weight.abs() * x.reshape(-1, x.shape[-1]).norm(dim=0)
    lowest = scores.argsort(dim=1, stable=True)[:, : scores.shape[1] // 2]
    wanted = weight.clone().scatter_(1, lowest, 0)
    got = load(tmp_path / "out", dtype=torch.float32).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("sparsity", ["0.5", "2:4", "4:8"])
def test_patterns_hold_and_stay_through_gptq(sparsity: str, source: Any, tmp_path: Path) -> None:
    recipe = f"{CALIBRATE.format(ready_inputs(), 6)} | prune.wanda(sparsity={sparsity}) | quantize.gptq(scheme=w4a16g32)"
    result = do(source("llama"), tmp_path / "out", recipe)
    assert {r.state for r in result.manifest.weights.values()} == {f"codes(w4a16g32)+masked({Sparsity.parse(sparsity)})"}
    dense_view, pruned = (
        DenseView(open_checkpoint(tmp_path / "out")),
        DenseView(open_checkpoint(step_of(tmp_path / "out", "prune.wanda"))),
    )
    for name in result.manifest.weights:
        before, after = pruned.dense(name), dense_view.dense(name)
        assert not bool(after[before == 0].any())
        if ":" in sparsity:
            kept, of = map(int, sparsity.split(":"))
            assert int((before != 0).unflatten(-1, (-1, of)).sum(-1).max()) <= kept
        assert not torch.signbit(before[before == 0]).any()


def test_all_columns_alike_make_wanda_magnitude_by_row() -> None:
    from compress.numerics.norms import InputNorms

    w, norms = torch.randn(8, 32), InputNorms(32)
    norms.add(torch.ones(10, 32))
    half = Sparsity.parse("0.5")
    assert torch.equal(keep_best(w.abs() * norms.rms(), half, per_row=True), keep_best(w.abs(), half, per_row=True))


def test_weights_that_read_the_same_share_a_statistic(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gptq, widths = load_pass("quantize.gptq"), []
    statistic = gptq.statistic
    monkeypatch.setattr(gptq, "statistic", lambda self, width: [widths.append(width), statistic(self, width)][1])
    do(source("llama"), tmp_path / "out", f"{CALIBRATE.format(ready_inputs(), 6)} | {GPTQ}")
    assert widths == 2 * [64, 64, 64, 96]  # q k v; o; gate up; down


@pytest.mark.parametrize(
    ("name", "recipe"), [("llama", GPTQ), ("mixtral", GPTQ), ("t5", GPTQ), *(("mixtral", smooth) for smooth in SMOOTH)]
)
def test_budgets_cost_time_and_nothing_else(
    name: str, recipe: str, source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that are dropped and run again, states that wait in files, and experts in rounds give the same bytes."""
    recipe = f"{CALIBRATE.format(ready_inputs(), 6)} | {recipe}"
    monkeypatch.setattr("compress.layerwise.batches.BATCH_TOKENS", 48)
    do(source(name), tmp_path / "a", recipe)
    monkeypatch.setattr(sweep, "HELD_BYTES", 1)
    monkeypatch.setattr(sweep, "STATISTICS_BYTES", 1)
    monkeypatch.setattr(sweep, "BETWEEN_BYTES", 1)
    monkeypatch.setattr("compress.layerwise.hidden_state_offload._SMALLEST", 1)
    do(source(name), tmp_path / "b", recipe)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_padding_does_not_count(source: Any, tmp_path: Path) -> None:
    """Samples with padding calibrate like the same samples without it."""
    ids = torch.randint(3, 128, (40, 16), generator=torch.Generator().manual_seed(3))
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(40, 8, dtype=ids.dtype)], 1),
        "attention_mask": torch.ones(40, 24, dtype=torch.uint8),
    }
    padded["attention_mask"][:, 16:] = 0
    save_file({"input_ids": ids}, tmp_path / "plain.safetensors")
    save_file(padded, tmp_path / "padded.safetensors")
    errors = []
    for kind in ("plain", "padded"):
        recipe = f"{CALIBRATE.format(tmp_path / f'{kind}.safetensors', 40)} | {GPTQ}"
        errors.append(
            {n: r.output_error for n, r in do(source("llama"), tmp_path / kind / "out", recipe).manifest.weights.items()}
        )
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_an_interrupted_sweep_goes_on_and_ends_at_the_same_bytes(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.checkpoint.writer import Writer

    recipe = f"{CALIBRATE.format(ready_inputs(), 6)} | {GPTQ} | pack(format=compressed-tensors)"
    do(source("mixtral"), tmp_path / "whole", recipe)
    record, solved = Writer.record, []

    def stop(self: Writer, weight: str, *rest: Any) -> None:
        if len(solved) == 17:
            raise KeyboardInterrupt
        solved.append(weight)
        record(self, weight, *rest)

    monkeypatch.setattr(Writer, "record", stop)
    untouched = len(open_checkpoint(source("mixtral")).refs) - FAMILIES["mixtral"].linears
    solved += [""] * -untouched
    with pytest.raises(KeyboardInterrupt):
        do(source("mixtral"), tmp_path / "out", recipe)
    monkeypatch.setattr(Writer, "record", record)
    again: list[str] = []
    gptq = load_pass("quantize.gptq")
    solve = gptq.solve
    monkeypatch.setattr(gptq, "solve", lambda s, jobs, p: [again.extend(j.weight.name for j in jobs), solve(s, jobs, p)][1])
    do(source("mixtral"), tmp_path / "out", recipe)
    assert not set(again) & set(solved)
    assert tree(tmp_path / "whole") == tree(tmp_path / "out")


COMMAND = [sys.executable, "-m", "compress", "run"]
ENVIRONMENT = {**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the trained models are not here")
def test_ten_kills_at_random_moments_leave_the_same_bytes(tmp_path: Path) -> None:
    import random

    model, data = SHARED / "models/tiny-llama-8m", SHARED / "data/code.train.jsonl"
    recipe = f"calibrate(data={data}, samples=32, length=256) | quantize.gptq(scheme=w4a16g64) | pack"
    subprocess.run([*COMMAND, model, tmp_path / "whole", "-p", recipe], check=True, env=ENVIRONMENT)
    chance, kills = random.Random(0), 0
    while kills < 10:
        process = subprocess.Popen([*COMMAND, model, tmp_path / "out", "-p", recipe], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        time.sleep(chance.uniform(4, 12))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if process.returncode == 0:
            kept = tree(tmp_path / "out")
            assert kept == tree(tmp_path / "whole")
            subprocess.run(["rm", "-rf", tmp_path / "out", tmp_path / "out.steps"], check=True)
    subprocess.run([*COMMAND, model, tmp_path / "out", "-p", recipe], check=True, env=ENVIRONMENT)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize(("name", "recipes"), [
    ("mixtral", (RESIDUAL, *SMOOTH)),
    pytest.param("llama", (RESIDUAL, *SMOOTH), marks=pytest.mark.slow),
    pytest.param("mixtral", ("prune.wanda(sparsity=2:4)", GPTQ), marks=pytest.mark.slow),
    pytest.param("llama", ("prune.wanda(sparsity=2:4)", GPTQ), marks=pytest.mark.slow),
])  # fmt: skip
def test_two_processes_equal_one(name: str, recipes: tuple[str, ...], source: Any, tmp_path: Path) -> None:
    """Every byte, whatever the pass: batches are cut alike, and their statistics add up without rounding."""
    for ranks in (1, 2):
        for number, recipe in enumerate(recipes):
            passes = f"{CALIBRATE.format(ready_inputs(360), 360)} | {recipe}"
            how = ("--dtype", "float32", "--threads", 1, "--quiet")
            done = compress("run", source(name), tmp_path / f"{ranks}-{number}", "-p", passes, *how, ranks=ranks)
            assert done.returncode == 0, done.stderr
    for number, recipe in enumerate(recipes):
        manifest = open_checkpoint(tmp_path / f"2-{number}").manifest
        assert manifest is not None
        assert manifest.measured["ranks"] == 2
        assert tree(tmp_path / f"1-{number}") == tree(tmp_path / f"2-{number}"), recipe


def test_calibration_travels_until_it_is_packed(source: Any, tmp_path: Path) -> None:
    calibrate = CALIBRATE.format(ready_inputs(), 6)
    do(source("llama"), tmp_path / "c", calibrate)
    do(tmp_path / "c", tmp_path / "q", GPTQ)
    do(tmp_path / "q", tmp_path / "p", "pack")
    assert (tmp_path / "q/calibration.safetensors").is_file()
    assert not (tmp_path / "p/calibration.safetensors").exists()
    do(source("llama"), tmp_path / "at once", f"{calibrate} | {GPTQ} | pack")
    a, b = (tree(tmp_path / out) for out in ("p", "at once"))
    assert {n: v for n, v in a.items() if n != "manifest.json"} == {n: v for n, v in b.items() if n != "manifest.json"}
    # Between steps only the tokens are kept: the weights lie where they were.
    assert sorted(f.name for f in step_of(tmp_path / "at once", "calibrate").iterdir()) == [
        "calibration.safetensors",
        "manifest.json",
    ]


def test_what_cannot_be_swept_is_refused_before_any_work(source: Any, tmp_path: Path) -> None:
    calibrate = CALIBRATE.format(ready_inputs(), 6)
    with pytest.raises(RecipeError, match=re.escape("MODEL OUT -p 'calibrate | quantize.gptq(")):
        do(source("llama"), tmp_path / "out", GPTQ)
    with pytest.raises(CoverageError, match="cannot be watched"):
        do(source("llama4"), tmp_path / "out", f"{calibrate} | {GPTQ}")
    with pytest.raises(CoverageError, match="outside of them"):
        do(source("llama"), tmp_path / "out", f"{calibrate} | quantize.gptq(scheme=w4a16g32, targets=[head])")
    assert not (tmp_path / "out").exists()


def test_towers_are_not_fed(source: Any, tmp_path: Path) -> None:
    recipe = f"{CALIBRATE.format(ready_inputs(), 6)} | quantize.gptq(scheme=w4a16g32, targets=['re:.*vision.*fc1.weight'])"
    with pytest.raises(CoverageError, match="not tower:vision"):
        do(source("llava"), tmp_path / "out", recipe)


def test_a_weight_that_no_batch_reaches_is_an_error(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.layerwise.stepwise.ForwardHooks.watch", lambda self, readers: lambda: None)
    with pytest.raises(CoverageError, match="nothing observed"):
        do(source("llama"), tmp_path / "out", f"{CALIBRATE.format(ready_inputs(), 6)} | {GPTQ}")


def test_the_dense_view_of_a_sweep_runs(source: Any, tmp_path: Path) -> None:
    do(source("qwen3_moe"), tmp_path / "out", f"{CALIBRATE.format(ready_inputs(), 6)} | {GPTQ}")
    model = load(dense_meaning(tmp_path / "out", tmp_path / "dense"))
    assert sum(p.numel() for p in model.parameters())


def test_fused_experts_are_loaded_as_often_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert that takes its new value loads all of its block, so that they take it together."""
    from compress.layerwise.meta_model import MetaModel

    monkeypatch.setattr("compress.executors.sweep.STATISTICS_BYTES", 1)
    loaded: list[str] = []
    load_parameter = MetaModel._load_parameter

    def spy(self: MetaModel, parameter: str, within: str = "") -> None:
        loaded.append(parameter)
        load_parameter(self, parameter, within)

    monkeypatch.setattr(MetaModel, "_load_parameter", spy)
    counts = []
    for experts in (3, 6):
        sizes = replace(FAMILIES["mixtral"], config={"num_local_experts": experts})
        monkeypatch.setitem(FAMILIES, "mixtral", sizes)
        source = build("mixtral", tmp_path / str(experts))
        loaded.clear()
        do(source, tmp_path / f"out{experts}", f"{CALIBRATE.format(ready_inputs(), 6)} | {GPTQ}")
        counts.append(sorted(loaded))
    assert counts[0] == counts[1]
    assert max(counts[0].count(name) for name in counts[0] if "experts" in name) <= 3


@pytest.mark.parametrize("at", [12, 13])
def test_inputs_are_rounded_alike_where_weights_of_one_input_were_half_solved(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward that has paused at the first of them goes on with inputs rounded as the second run has them from the start."""
    model = tiny_llama(tmp_path / "model", num_hidden_layers=3)
    recipe = f"{CALIBRATE.format(ready_inputs(16), 16)} | quantize.gptq(scheme=w4a4)"
    goes_on(monkeypatch, model, tmp_path, recipe, "gptq", at)
