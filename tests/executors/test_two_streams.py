"""Two streams: pairs of inputs as they are and as they were, and GPTQ that makes up for what stands before a weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.checkpoint.reader import open_checkpoint
from compress.contract.discover import load_pass
from compress.errors import CompressError
from compress.executors.residual_stream import adders
from compress.layerwise.dense_view import DenseView
from compress.layerwise.meta_model import MetaModel
from compress.layerwise.model import build as model_of
from compress.layerwise.stepwise import ForwardHooks, StepwiseForward
from compress.numerics.gptq import Settings, solve
from compress.numerics.hessian import Hessian, PairedHessian, corrected, factor, prepare
from compress.numerics.qtensor import integers
from compress.spec.scheme import Scheme
from families import build
from support import do, goes_on, ready_inputs, step_of

CALIBRATE = f"calibrate(data='{ready_inputs(12)}', samples=12)"
RESIDUAL = "quantize.gptq(scheme=w3a16g32, ragged=divide, correct=residual)"


def pairs(tokens: int = 400, width: int = 48, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs as they were and as they are, with a weight [16, width]; what changed them depends on them."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=made) @ torch.randn(width, width, generator=made)
    u = x + 0.2 * x @ torch.randn(width, width, generator=made) + torch.randn(tokens, width, generator=made)
    return x, u, torch.randn(16, width, generator=made)


def paired(x: torch.Tensor, u: torch.Tensor) -> PairedHessian:
    found = PairedHessian(x.shape[1])
    for part in range(0, len(x), 100):
        found.add_pair(u[part : part + 100], x[part : part + 100])
    return found


def test_the_correction_is_the_ridge_solution() -> None:
    """Of |x W^T - u V^T|^2 per token + lambda |V - W|^2, by least squares on stacked rows in fp64."""
    x, u, w = pairs()
    found = prepare(paired(x, u), 0.01, "none", 1, "")
    assert found.correction is not None
    root = (found.factor.ridge * len(x)) ** 0.5
    eye = root * torch.eye(x.shape[1], dtype=torch.float64)
    left = torch.cat([u.double(), eye])
    right = torch.cat([x.double(), eye]) @ w.double().T
    expected = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close((w @ found.correction).double(), expected, rtol=1e-3, atol=1e-3)


def test_what_is_missing_besides_is_a_part_of_the_ridge_solution() -> None:
    """Of |r + x W^T - u V^T|^2 per token + lambda |V - W|^2."""
    x, u, w = pairs()
    r = u @ torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
    statistic = PairedHessian(48)
    statistic.expect_residual(16)
    for part in range(0, len(x), 100):
        statistic.add_pair(u[part : part + 100], x[part : part + 100])
        statistic.add_residual(u[part : part + 100], r[part : part + 100])
    found = prepare(statistic, 0.01, "none", 1, "")
    eye = (found.factor.ridge * len(x)) ** 0.5 * torch.eye(48, dtype=torch.float64)
    right = torch.cat([(r + x @ w.T).double(), eye @ w.double().T])
    expected = torch.linalg.lstsq(torch.cat([u.double(), eye]), right).solution.T
    torch.testing.assert_close(found.target(w).double(), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "count"), [("llama", 2), ("qwen3", 2), ("gpt2", 2), ("mixtral", 1), ("gemma2", 0), ("falcon", 0)]
)
def test_linears_that_add_to_the_residual_stream_are_found(name: str, count: int, source: Callable[[str], Path]) -> None:
    """Not where outputs are normed before they are added (Gemma 2), or added together (Falcon's parallel blocks)."""
    meta_model = MetaModel(DenseView(open_checkpoint(source(name))), torch.bfloat16, torch.device("cpu"))
    ids = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), ForwardHooks(meta_model) as hooks:
        call = StepwiseForward(meta_model, {"input_ids": ids}).advance()
        assert call is not None
        meta_model.load(call.block.path)
        linears = {
            w.module for w in meta_model.model.weights if w.kind == "linear" and w.module.startswith(f"{call.block.path}.")
        }
        found = adders(hooks, call, linears)
    assert len(found) == count, found
    if name == "llama":
        names = {path.rpartition(".")[2]: reader.rpartition(".")[2] for path, reader in found.items()}
        assert names == {"o_proj": "input_layernorm", "down_proj": "post_attention_layernorm"}


def test_unchanged_inputs_need_no_correction() -> None:
    x, _, _ = pairs()
    found = prepare(paired(x, x), 0.01, "activation", 1, "")
    torch.testing.assert_close(found.correction, torch.eye(x.shape[1]), rtol=0, atol=1e-5)


def qronos(w: torch.Tensor, x: torch.Tensor, u: torch.Tensor, scale: torch.Tensor, ridge: float) -> torch.Tensor:
    """Codes of one row, one column after the other, each time by least squares over all that is not rounded yet (fp64).

    The paper's iteration, but that the first column starts from the least squares solution, as all others do.
    """
    n = len(w)
    root = (ridge * len(x)) ** 0.5
    eye = root * torch.eye(n, dtype=torch.float64)
    target = torch.cat([x, eye]) @ w
    inputs, codes = torch.cat([u, eye]), torch.zeros(n, dtype=torch.float64)
    for k in range(n):
        rest = target - inputs[:, :k] @ (scale[:k] * codes[:k])
        free = torch.linalg.lstsq(inputs[:, k:], rest[:, None]).solution[:, 0]
        codes[k] = (free[0] / scale[k]).round().clamp(-8, 7)
    return codes


def test_gptq_of_corrected_weights_is_qronos() -> None:
    """The same codes, up to a tie, on the same scales."""
    made = torch.Generator().manual_seed(0)
    x, w = torch.randn(400, 24, generator=made), torch.randn(16, 24, generator=made)
    u = x + 0.1 * x @ torch.randn(24, 24, generator=made) + 0.3 * torch.randn(400, 24, generator=made)
    found = prepare(paired(x, u), 0.01, "none", 1, "")
    assert found.correction is not None
    scheme = Scheme.parse("w4a16")
    how = Settings(clip="none", signed=False, sweeps=0, refit=False)
    got = solve(w @ found.correction, found.factor, found.hessian, scheme, torch.float32, how)
    same = 0
    for row in range(len(w)):
        scale = got.scale[row].double().expand(w.shape[1])
        codes = qronos(w[row].double(), x.double(), u.double(), scale, found.factor.ridge)
        same += int((codes + 8 == got.codes[row].double()).sum())
    assert same >= 0.99 * w.numel()


def gptaq(w: torch.Tensor, x: torch.Tensor, u: torch.Tensor, scale: torch.Tensor, ridge: float, share: float) -> torch.Tensor:
    """Values [rows, n] by the column loop of Li et al. (2504.02692): each column hands what its inputs have changed by, times
    `share`, and its rounding error to those after it (fp64)."""
    n = w.shape[1]
    h = u.T @ u / len(x) + ridge * torch.eye(n, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    p = share * ((x - u).T @ u / len(x) @ upper.T).triu(1) @ upper
    w, values = w.clone(), torch.zeros_like(w)
    for k in range(n):
        column = w[:, k].clone()
        values[:, k] = scale[:, k] * (column / scale[:, k]).round().clamp(-4, 3)
        w[:, k:] -= torch.outer((column - values[:, k]) / upper[k, k], upper[k, k:]) - torch.outer(column, p[k, k:])
    return values


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_gptaq_lowers_the_same_error_by_less(share: float) -> None:
    """Its columns make up only for changed inputs of the columns before them; the ridge solution has them all make up for all."""
    x, u, w = (part.double() for part in pairs(width=64))
    scale = (w.abs().amax(1, keepdim=True) / 3.5).expand_as(w)
    found = prepare(paired(x.float(), u.float()), 0.01, "none", 1, "")
    assert found.correction is not None

    def left(values: torch.Tensor) -> float:
        return float((x @ w.T - u @ values.T).square().sum())

    plain = left(gptaq(w, x, u, scale, found.factor.ridge, 0.0))
    theirs = left(gptaq(w, x, u, scale, found.factor.ridge, share))
    ours = left(gptaq(w @ found.correction.double(), u, u, scale, found.factor.ridge, 0.0))
    assert ours < 0.9 * theirs < 0.9 * plain


@pytest.mark.parametrize("text", ["w3a16g16", "w4a16g16-asym", "nf3g16", "mxfp4"])
def test_outputs_are_closer_to_those_of_the_unchanged_inputs(text: str) -> None:
    x, u, w = pairs(width=64)
    found, alone = prepare(paired(x, u), 0.01, "activation", 1, ""), Hessian(64)
    alone.add(u)
    plain = prepare(alone, 0.01, "activation", 1, "")
    assert found.correction is not None
    scheme, lost = Scheme.parse(text), []
    for target, at in ((w, plain), (w @ found.correction, found)):
        made = solve(target, at.factor, at.hessian, scheme, torch.float32, Settings())
        q = integers(scheme, made.codes, made.scale, made.zero)
        lost.append(float((x @ w.T - u @ q.dequantize().T).square().sum()))
    assert lost[1] < 0.7 * lost[0]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral", "gemma2"])
def test_pairs_are_of_the_unchanged_and_of_the_finished_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments of what every linear reads, by two plain forwards of transformers; routed experts have none."""
    source = build(name, tmp_path)
    gptq, seen, last = load_pass("quantize.gptq"), {}, {}
    real_prepare, real_solve = gptq.prepare, gptq.solve

    def prepared(self: Any, statistic: Any) -> Any:
        cross = statistic.cross / statistic.paired if statistic.paired else None
        made = real_prepare(self, statistic)
        last[id(made)] = cross, made
        return made

    def solved(self: Any, tasks: Any, made: Any) -> Any:
        seen.update({task.weight.name: last[id(made)][0] for task in tasks})
        return real_solve(self, tasks, made)

    monkeypatch.setattr(gptq, "prepare", prepared)
    monkeypatch.setattr(gptq, "solve", solved)
    targets = "[linear, experts]" if name == "mixtral" else "[linear]"
    recipe = f"{CALIBRATE} | quantize.gptq(scheme=w3a16g8, ragged=divide, correct=qronos, min_tokens=1, targets={targets})"
    result = do(source, tmp_path / "out", recipe)
    experts = {name for name in seen if ".experts." in name}
    assert bool(experts) == (name == "mixtral")
    noted = {name for note in result.manifest.notes if note.what == "uncorrected" for name in note.names}
    assert noted == {name for name in experts if seen[name] is None} == experts
    ids = load_file(tmp_path / "out/calibration.safetensors")["input_ids"].long()
    reads = [inputs(model_of(open_checkpoint(folder)), ids) for folder in (source, tmp_path / "out")]
    checked = 0
    for weight, cross in seen.items():
        path = weight.removesuffix(".weight")
        if cross is None or path not in reads[0]:
            continue
        x, u = (read[path].double() for read in reads)
        expected = x.T @ u / len(x)
        torch.testing.assert_close(cross.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()), msg=weight)
        checked += 1
    assert checked >= 4


def inputs(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every module with a weight reads, [tokens, width]."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():

        def hook(_: Any, args: tuple[Any, ...], path: str = path) -> None:
            if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
                found.setdefault(path, args[0].detach().reshape(-1, args[0].shape[-1]))

        module.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(ids)
    return found


def test_a_model_comes_closer_on_its_calibration_tokens(tiny: Path, tmp_path: Path) -> None:
    apart = []
    for correct in ("none", "qronos", "residual"):
        out = tmp_path / correct
        do(tiny, out, f"{CALIBRATE} | quantize.gptq(scheme=w2a16g32, ragged=divide, correct={correct})")
        ids = load_file(out / "calibration.safetensors")["input_ids"].long()
        with torch.no_grad():
            dense, made = (model_of(open_checkpoint(folder))(ids).logits for folder in (tiny, out))
        apart.append(float((dense - made).square().mean()))
    assert apart[2] < apart[1] < apart[0]


def test_what_the_stream_has_lost_is_that_of_two_forwards(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each linear that adds to it, between the unchanged and the finished model, both run by transformers."""
    seen: list[torch.Tensor] = []
    real = PairedHessian.add_residual

    def add(self: PairedHessian, u: torch.Tensor, r: torch.Tensor) -> None:
        if self.residual is not None and not self.residual.any():
            seen.append(torch.zeros(0, r.shape[1]))
        seen[-1] = torch.cat([seen[-1], r])
        real(self, u, r)

    monkeypatch.setattr(PairedHessian, "add_residual", add)
    do(tiny, tmp_path / "out", f"{CALIBRATE} | {RESIDUAL}")
    ids = load_file(tmp_path / "out/calibration.safetensors")["input_ids"].long()
    there, here = (inputs(model_of(open_checkpoint(folder)), ids) for folder in (tiny, tmp_path / "out"))
    norms = [f"model.layers.{n}.{norm}" for n in range(2) for norm in ("input_layernorm", "post_attention_layernorm")]
    assert len(seen) == len(norms)
    for r, norm in zip(seen[1:], norms[1:], strict=True):
        torch.testing.assert_close(r, there[norm] - here[norm], rtol=1e-3, atol=1e-4)


def test_pruned_weights_stay_zeros(tiny: Path, tmp_path: Path) -> None:
    do(tiny, tmp_path / "out", f"{CALIBRATE} | prune.magnitude(sparsity=2:4) | {RESIDUAL}")
    pruned = load_file(next(step_of(tmp_path / "out", "prune.magnitude").glob("model*.safetensors")))
    model = model_of(open_checkpoint(tmp_path / "out"))
    path = "model.layers.1.mlp.down_proj.weight"
    kept = model.get_submodule(path.removesuffix(".weight")).weight
    assert not kept[pruned[path] == 0].any()
    assert kept.any()


def test_an_interrupted_run_goes_on_to_the_same_bytes(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on(monkeypatch, tiny, tmp_path, f"{CALIBRATE} | {RESIDUAL}", "gptq", 10)


def test_what_does_not_go_together_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="outliers: not with correct=qronos"):
        do(tiny, tmp_path / "out", f"{CALIBRATE} | quantize.gptq(scheme=w4a16g32, outliers=0.01, correct=qronos)")


def test_a_correction_of_inputs_that_are_always_zero_is_none() -> None:
    x, u, _ = pairs()
    x, u = x.clone(), u.clone()
    x[:, 5] = u[:, 5] = 0
    h, c = u.T @ u / len(u), x.T @ u / len(u)
    found, _ = corrected(c, None, h, factor(h.clone()).ridge)
    torch.testing.assert_close(found[5], torch.eye(len(h))[5])
