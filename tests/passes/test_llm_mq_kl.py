"""quantize.llm_mq(mode=kl): what a rounding adds to the KL, which weights that measures, and what rounds in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import forked
from allocations import CALIBRATE, SCHEMES, mq, rows
from compress.checkpoint.reader import open_checkpoint
from compress.errors import CoverageError, RecipeError
from compress.layerwise.dense_view import DenseView
from compress.numerics.rounding import nearest
from compress.spec.scheme import Scheme
from families import build
from support import do, load, ready_inputs, run, step_of, tiny_llama


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_kl_costs_are_what_inputs_and_gradients_by_outputs_say(method: str, tiny: Path, tmp_path: Path) -> None:
    """tr(G D H D^T) / 2, with H and G of plain autograd, labels drawn as the sweep draws them, and D of what is then rounded."""
    do(tiny, tmp_path / "out", mq(f"bits=4, mode=kl, method={method}, clip=none"))
    drawn_from = load_file(step_of(tmp_path / "out", "calibrate") / "calibration.safetensors")
    model, ids = load(tiny, dtype=torch.float32), drawn_from["input_ids"]
    x, g = dict[str, torch.Tensor](), dict[str, torch.Tensor]()

    def watch(name: str) -> Any:
        def hook(_: Any, given: Any, output: torch.Tensor) -> None:
            x[name] = given[0].detach().flatten(0, -2).double()
            output.register_hook(lambda gradient: g.update({name: gradient.flatten(0, -2).double()}))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_hook(watch(name))
    predicted = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    chances = torch.rand(len(predicted), 1, generator=torch.Generator().manual_seed(0))
    drawn = (predicted.float().softmax(-1).cumsum(1) <= chances).sum(1)
    torch.nn.functional.cross_entropy(predicted, drawn, reduction="sum").backward()
    table, codes = rows(tmp_path / "out"), DenseView(open_checkpoint(tmp_path / "out"))
    assert len(table) == 14
    for name, row in table.items():
        path = name.removesuffix(".weight")
        w = model.get_parameter(name).detach().bfloat16()
        if method == "gptq":  # 4 bits are what it was solved for with, up to ties
            q, schemes, near = codes.qtensor(name), SCHEMES[-1:], 0.05
            if not path.startswith("model.layers.0.self_attn.") or path.endswith("o_proj"):
                continue  # what others read has changed by then
        else:
            q, schemes, near = None, SCHEMES, 2e-3
        for scheme in schemes:
            meant = (q or nearest(w, Scheme.parse(scheme), torch.bfloat16).q).dequantize().double()
            d = w.double() - meant
            wanted = float((((g[path].T @ g[path]) / len(g[path])) @ d * (d @ (x[path].T @ x[path] / len(x[path])))).sum()) / 2
            assert row["costs"][f"codes({scheme})"] == pytest.approx(wanted, rel=near)


def test_kl_is_of_linears_and_what_is_no_linear_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CoverageError, match="mode=kl measures linears inside blocks, and it is an expert"):
        run(build("mixtral", tmp_path), tmp_path / "out", mq("bits=3, mode=kl"))
    with pytest.raises(CoverageError, match="mode=kl measures linears inside blocks, and it is a Conv1D"):
        run(build("gpt2", tmp_path), tmp_path / "out", mq("bits=3, mode=kl"))


@pytest.mark.parametrize(("family", "targets", "mode", "others"), [
    ("tied", "linear", "kl", 0), ("tied", "[linear, embeddings]", "abs", 1), ("mixtral", "attention", "kl", 0), ("mixtral", "linear", "abs", 24),
    ("gpt2", "linear", "abs", 8),
])  # fmt: skip
def test_costs_are_by_kl_where_it_measures_all_that_is_targeted(
    family: str, targets: str, mode: str, others: int, tmp_path: Path
) -> None:
    """And by abs elsewhere, which the plan and the manifest say, with the weights that are no linears inside blocks."""
    source, options = build(family, tmp_path), f"bits=3, method=rtn, targets={targets}"
    done = run(source, tmp_path / "auto", mq(options))
    run(source, tmp_path / "named", mq(f"{options}, mode={mode}"))
    run(source, tmp_path / "other", mq(f"{options}, mode=fisher"))
    costs = {name: [row["costs"] for row in rows(tmp_path / name).values()] for name in ("auto", "named", "other")}
    assert costs["auto"] == costs["named"] != costs["other"]
    for notes in (done.plan.steps[-1].notes, done.manifest.notes):
        assert [note.count for note in notes if note.what == "costs"] == [others] * (others > 0)


def test_costs_by_kl_hang_little_on_the_number_of_processes(tmp_path: Path) -> None:
    """Each draws labels of its own."""
    source = tiny_llama(tmp_path / "model")
    for ranks in (1, 2):
        deciding = mq("bits=3, mode=kl, method=rtn").partition(" | ")[2]
        passes = f"calibrate(data='{ready_inputs(64)}', samples=64) | {deciding}"
        done = forked.compress("run", source, tmp_path / f"{ranks}", "-p", passes, "--threads", 1, "--quiet", ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (rows(tmp_path / f"{ranks}") for ranks in (1, 2))
    for name, row in one.items():
        assert two[name]["costs"] == pytest.approx(row["costs"], rel=0.05), name
        assert two[name]["costs"] != row["costs"]


def test_what_rounds_in_the_end_takes_the_corrections(tiny: Path, tmp_path: Path) -> None:
    """With one scheme to choose it is quantize.gptq with these options."""
    more = "correct=residual, feedback=both"
    run(tiny, tmp_path / "mq", mq(f"bits=3, mode=kl, {more}", SCHEMES[1:2]))
    run(tiny, tmp_path / "gptq", f"{CALIBRATE} | quantize.gptq(scheme={SCHEMES[1]}, {more})")
    a, b = (DenseView(open_checkpoint(tmp_path / name)) for name in ("mq", "gptq"))
    for name in a.weights:
        first, second = a.qtensor(name), b.qtensor(name)
        assert first is not None
        assert second is not None
        assert torch.equal(first.codes, second.codes)
    for options in ("method=rtn, correct=residual", "correct=residual, outliers=0.01"):
        with pytest.raises(RecipeError, match=r"only with method=gptq|not with correct or feedback"):
            run(tiny, tmp_path / "out", mq(f"bits=3, {options}"))
    with pytest.raises(CoverageError, match="scales that rows share"):
        run(tiny, tmp_path / "out", mq("bits=8, feedback=both", ("fp8-tensor", "w4a16g32")))
