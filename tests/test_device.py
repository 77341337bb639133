"""A device of one's choice: what is refused, and a rehearsal of everything that computes there.

Without a GPU the rehearsal stands for one (rehearsal.py): tensors of here and there in one operation are an error, what the
host reads back is counted by who did it, and every byte must be the CPU's.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import device
from compress.checkpoint.reader import open_checkpoint
from compress.cli.app import build as commands
from compress.context import Context
from compress.contract.discover import load_pass, pass_files
from compress.contract.pass_base import Pass
from compress.contract.tasks import Solution
from compress.errors import MachineError, UsageError
from compress.executors import sweep
from compress.layerwise.meta_model import MetaModel
from compress.numerics import floats
from compress.numerics.lowrank import Factors
from compress.numerics.qtensor import QTensor
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State
from families import build
from forked import python
from rehearsal import GPU, NAME, Rehearsal
from support import do, ready_inputs, tiny_llama, tree

ROOT = Path(__file__).parents[1]
RECIPES = {
    "gptq": "quantize.gptq(scheme=w4a16g32)",
    "as stored": "quantize.gptq(scheme=w3a16g32-asym, order=stored, outliers=0.01, targets=[re:.*v_proj.*, re:.*down_proj.*])",
    "both": "quantize.gptq(scheme=w3a16g32, feedback=both)",
    "floats": "quantize.gptq(scheme=nvfp4, sweeps=0, targets=re:.*v_proj.*)",
    "activations": "quantize.gptq(scheme=nvfp4-anvfp4, sweeps=0, targets=re:.*v_proj.*)",
    "quik": "quantize.quik(targets=[re:.*v_proj.*, re:.*down_proj.*])",
    "wanda": "prune.wanda(sparsity=0.5)",
    "sparsegpt": "prune.sparsegpt(sparsity=0.5, owl=true, refit=true, targets=[attention])",
    "alps": "prune.sparsegpt(sparsity=2:4, solver=alps, targets=re:.*v_proj.*)",
    "zeros": "quantize.gptq(scheme=w4a16g32, sparsity=2:4, targets=re:.*v_proj.*)",
    "masked": "prune.wanda(sparsity=2:4) | quantize.gptq(scheme=w4a16g32, targets=re:.*down_proj.*)",
    "awq": "quantize.smooth(scheme=w4a16g32, steps=3)",
    "smoothquant": "quantize.smooth(method=smoothquant)",
    "lorc": "quantize.rtn(scheme=w2a16g32) | quantize.lorc(weighted=true, rank=4)",
    "llm_mq": "quantize.llm_mq(bits=3, mode=abs, schemes=[w2a16g32, w3a16g32, w4a16g32], outliers=0.01, method=rtn, clip=none)",
    "llm_mq by kl": "quantize.llm_mq(bits=3, schemes=[w2a16g32, w3a16g32, w4a16g32], method=rtn)",
}
ONCE_A_WEIGHT = {
    "gptq.solve", "gptq._stack", "input_peaks.put", "wanda.solve", "hessian.errors", "owl.outlier_share", "lorc.solve", "smooth.put", "smoothing.cost", "llm_mq._felt", "llm_mq.costs_by_both",
    "output_grams.write",
    "masks._bin", "masks.keep_above", "masks.holds", "outliers.gather", "anomalies.watch", "anomalies.<genexpr>",
    "rounding.largest", "scales.divisor", "grid.round_to_nearest", "gradients._take", "device.moved",
}  # fmt: skip
"""Functions that may wait for numbers of a weight: its errors, its outliers, its solution on its way to the writer."""
NOW_AND_THEN = {"alps.prune"}
"""A solver that asks every few steps whether its mask still changes."""
ONCE_A_STATISTIC = {"across.largest", "hessian.factor", "hessian.finite", "norms.rms", "smoothing._finite"}
ONCE_A_BATCH = {"find_packed_sequence_indices", "warn_if_padding_and_no_attention_mask", "backward_batch.finish", "gradients.run"}
"""transformers asks the ids whether there is padding; the loss is a number."""
SENT = {
    "meta_model._initialise",
    "meta_model._read",
    "meta_model.stored",
    "sweep.matrix",
    "device.moved",
    "floats._tables",
    "scales.divisor",
    "output_grams.read",
    "backward_batch.finish",
}
"""What loads: weights, batches, tables of grids, Gram matrices, and a random number for each token."""
PARKED = {"hidden_state_offload._to_host", "hidden_state_offload.fetch", "spill.put", "spill.get"}


def calibrated(recipe: str) -> str:
    return f"calibrate(data={ready_inputs()}, samples=6, length=24) | {recipe}"


def sites(counts: Counter[str]) -> set[str]:
    return {where for what in counts for where in [what.partition(":")[0]] if where.partition(".")[2] not in ONCE_A_BATCH}


def rehearse(source: Path, folder: Path, recipe: str) -> Rehearsal:
    """Runs a recipe on the CPU and in rehearsal, and compares every byte but the manifests'."""
    do(source, folder / "cpu", recipe, device="cpu")
    # Tables of an earlier rehearsal do not lie on the device of this one.
    floats._tables.cache_clear()
    with Rehearsal() as rehearsal:
        do(source, folder / "gpu", recipe, device="auto")
    here, there = tree(folder / "cpu"), tree(folder / "gpu")
    assert json.loads(there.pop("manifest.json"))["device"] == NAME
    assert "device" not in json.loads(here.pop("manifest.json"))
    assert here == there
    return rehearsal


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_llama(tmp_path_factory.mktemp("device") / "small", **sizes)


@pytest.fixture
def belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever something is loaded, all that is in memory lies on the device, and no other block is in memory."""
    load = MetaModel.load

    def checked(self: MetaModel, path: str) -> None:
        load(self, path)
        blocks = [block.path for block in self.blocks]
        inside = tuple(f"{block}." for block in blocks if path in blocks)
        for name, tensor in (*self.module.named_parameters(), *self.module.named_buffers()):
            if tensor.device.type != "meta":
                assert tensor.device == self.device, name
                assert not (isinstance(tensor, torch.nn.Parameter) and name.startswith(inside)) or name.startswith(path), name

    monkeypatch.setattr(MetaModel, "load", checked)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_same_there_and_nothing_hidden_comes_back(name: str, small: Path, tmp_path: Path, belongs: None) -> None:
    rehearsal = rehearse(small, tmp_path, calibrated(RECIPES[name]))
    assert rehearsal.sent
    assert sites(rehearsal.reads) <= ONCE_A_WEIGHT | ONCE_A_STATISTIC | ONCE_A_BATCH | NOW_AND_THEN
    assert sites(rehearsal.sent) <= SENT
    # Weights of the two blocks, each once; what was solved goes on there.
    if name == "gptq":
        assert rehearsal.reads["device.moved: cpu"] == 14 * 2
        assert rehearsal.sent["sweep.matrix: cuda"] == 14


@pytest.mark.parametrize("name", ["mixtral", "t5", "gpt2"])
def test_families_with_experts_two_stacks_and_turned_weights(name: str, tmp_path: Path, belongs: None) -> None:
    rehearsal = rehearse(build(name, tmp_path), tmp_path, calibrated("prune.wanda(sparsity=0.5)"))
    # Where an expert's tokens begin and end is asked once for each forward of a block.
    assert sites(rehearsal.reads) <= ONCE_A_WEIGHT | ONCE_A_STATISTIC | ({"experts.forward"} if name == "mixtral" else set())


@pytest.mark.parametrize(("recipe", "hosted"), [("wanda", 1 << 30), ("wanda", 0), ("llm_mq", 0)])
def test_states_are_parked_in_the_hosts_memory_and_then_in_files(
    recipe: str, hosted: int, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.layerwise import hidden_state_offload

    monkeypatch.setattr("compress.layerwise.batches.BATCH_TOKENS", 48)
    monkeypatch.setattr(sweep, "HELD_BYTES", 1)
    monkeypatch.setattr("compress.checkpoint.spill._SMALLEST", 1)
    monkeypatch.setattr(hidden_state_offload, "_SMALLEST", 1)
    made, written = hidden_state_offload.HiddenStateOffload.__init__, []
    write = hidden_state_offload.HiddenStateOffload._write

    def init(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        self.budget, self.host_budget = 0, hosted

    monkeypatch.setattr(hidden_state_offload.HiddenStateOffload, "__init__", init)
    monkeypatch.setattr(
        hidden_state_offload.HiddenStateOffload,
        "_write",
        lambda self, *rest: [written.append(self.device), write(self, *rest)][1],
    )
    rehearsal = rehearse(small, tmp_path, calibrated(RECIPES[recipe]))
    assert (GPU in written) == (not hosted)
    assert sites(rehearsal.reads) <= ONCE_A_WEIGHT | ONCE_A_STATISTIC | ONCE_A_BATCH | PARKED
    assert "hidden_state_offload._to_host" in sites(rehearsal.reads)


def test_a_sweep_that_was_stopped_goes_on_to_the_same_bytes(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.checkpoint.writer import Writer

    recipe, record = calibrated(RECIPES["wanda"]), Writer.record
    solved: list[str] = []

    def stop(self: Writer, weight: str, *rest: Any) -> None:
        if len(solved) == 16:
            raise KeyboardInterrupt
        solved.append(weight)
        record(self, weight, *rest)

    with Rehearsal():
        do(small, tmp_path / "whole", recipe)
        monkeypatch.setattr(Writer, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            do(small, tmp_path / "out", recipe)
        monkeypatch.setattr(Writer, "record", record)
        kept: list[int] = []
        ctx = Context(threads=2, dtype="float32", events=lambda event: kept.append(event.get("kept", 0)))
        from compress.pipeline.run import run_recipe
        from compress.spec.recipe import parse_one_liner

        run_recipe(parse_one_liner(recipe), open_checkpoint(small), tmp_path / "out", ctx)
    assert any(kept)
    assert tree(tmp_path / "whole") == tree(tmp_path / "out")


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a command, run in this process."""
    words = [*map(str, arguments)]
    try:
        status = commands(words)(words, standalone_mode=False) or 0
    except SystemExit as end:
        status = end.code
    told = capsys.readouterr()
    return int(status or 0), told.out, told.err


@pytest.fixture(scope="module")
def artifact(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("device") / "w3"
    do(demo_model, out, "quantize.rtn(scheme=w3a16g32)")
    return out


@pytest.mark.parametrize("verb", ["eval", "diff", "generate"])
def test_commands_say_the_same_there(verb: str, demo_model: Path, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = demo_model.parent / "text" / "evaluation.jsonl"
    command: list[object] = {
        "eval": ["eval", artifact, "--against", demo_model, "--data", text, "--tokens", 512, "--json"],
        "diff": ["diff", demo_model, artifact],
        "generate": ["generate", artifact, "--prompt", "def f(", "--new-tokens", 8],
    }[verb]
    status, here, _ = said(capsys, *command, "--device", "cpu")
    assert status == 0
    with Rehearsal() as rehearsal:
        status, there, _ = said(capsys, *command, "--device", "cuda")
    assert status == 0
    assert rehearsal.sent
    if verb == "eval":
        found, wanted = json.loads(there), json.loads(here)
        assert found.pop("device") == f"cuda:0 ({NAME})"
        assert {**found, "seconds": 0} == {**wanted, "seconds": 0}
        # Of all logits, nothing but numbers for each token, and of some rows whether a NaN is among them.
        assert sites(rehearsal.reads) <= {"perplexity_kl.add", "perplexity_kl._rows"}
    else:
        assert there == here


def test_plan_tells_what_a_gpu_has_to_have(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", small, "-p", calibrated(RECIPES["gptq"])]
    with Rehearsal():
        status, text, _ = said(capsys, *command)
        facts = json.loads(said(capsys, *command, "--json")[1])["device"]
    assert status == 0
    assert f"device:   cuda:0 ({NAME}): at most " in text
    assert facts["name"] == "cuda:0"
    assert facts["gpu"] == NAME
    assert 0 < facts["peak_bytes"] < facts["free_bytes"]
    assert "device" not in said(capsys, *command, "--device", "cpu")[1].partition("weights")[2]


def test_a_gpu_with_too_little_memory_is_told_before_any_work(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Rehearsal():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (100 << 20, 1 << 30))
        status, _, told = said(capsys, "run", small, tmp_path / "out", "-p", calibrated(RECIPES["gptq"]), "--device", "cuda")
        assert "does not fit: step 2" in said(capsys, "plan", small, "-p", calibrated(RECIPES["gptq"]))[1]
    assert status == MachineError.exit_status
    assert "of the memory of cuda:0, its predicted peak" in told
    assert "104,857,600 bytes free of 1,073,741,824" in told
    assert "--device cpu" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("verb", ["run", "quantize gptq", "plan", "eval", "diff", "generate"])
def test_a_gpu_that_is_not_there_is_refused_before_any_work(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even the model is looked for."""
    nowhere, out = tmp_path / "nowhere", tmp_path / "out"
    data = ROOT / "compress" / "demo" / "text" / "evaluation.jsonl"
    command = {
        "run": ["run", nowhere, out, "-p", "quantize.rtn(scheme=w4a16g32)"],
        "quantize gptq": ["quantize", "gptq", nowhere, out, "--scheme", "w4a16g32"],
        "plan": ["plan", nowhere, "-p", "quantize.rtn(scheme=w4a16g32)"],
        "eval": ["eval", nowhere, "--data", data],
        "diff": ["diff", nowhere, nowhere],
        "generate": ["generate", nowhere, "--prompt", "a"],
    }[verb]
    status, _, told = said(capsys, *command, "--device", "cuda")
    assert status == MachineError.exit_status
    assert "error: --device cuda\n  expected: a GPU that torch can use\n  got:      none (torch " in told
    assert "do:       say cpu, or take a machine that has one" in told
    status, _, told = said(capsys, *command, "--device", "mps")
    assert status == UsageError.exit_status
    assert "expected: auto, cpu, cuda or cuda:N\n  got:      'mps', where nothing of this has ever run" in told


def test_words_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.resolve("cpu") == device.CPU
    for word in ("gpu", "cuda:", "cuda:x", "cpu:0", "auto:1", "xpu:0", ""):
        with pytest.raises(UsageError):
            device.resolve(word)
    made: list[torch.device] = []
    monkeypatch.setattr(device, "make_current", made.append)
    monkeypatch.setattr(device, "gpus", lambda: 0)
    assert device.resolve("auto") == device.CPU
    monkeypatch.setattr(device, "gpus", lambda: 2)
    assert device.resolve("auto") == device.resolve("cuda") == torch.device("cuda", 0)
    assert device.resolve("cuda:1") == made[-1] == torch.device("cuda", 1)
    with pytest.raises(MachineError, match="2 here, counted from 0"):
        device.resolve("cuda:2")
    # Under torchrun each process has the GPU of its own number.
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.resolve("auto", 2) == device.resolve("cuda", 2) == device.resolve("cuda:1", 2) == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="leave the number out"):
        device.resolve("cuda:0", 2)
    monkeypatch.setattr(device, "gpus", lambda: 1)
    with pytest.raises(MachineError, match="a GPU for each process"):
        device.resolve("auto", 2)


TWO = """
import os, sys
sys.path[:0] = [{tests!r}]
from compress.cli.app import build
from rehearsal import Rehearsal
words = [*sys.argv[1:], "--quiet", "--dtype", "float32"]
with Rehearsal(int(os.environ["LOCAL_RANK"])) as rehearsal:
    build(words)(words, standalone_mode=False)
assert rehearsal.sent
"""


def test_two_processes_with_a_gpu_each_equal_one_without(small: Path, tmp_path: Path) -> None:
    recipe = f"calibrate(data={ready_inputs(360)}, samples=360, length=24) | {RECIPES['wanda']} | {RECIPES['smoothquant']}"
    code = TWO.format(tests=str(ROOT / "tests"))
    done = python(code, "run", small, tmp_path / "two", "-p", recipe, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    do(small, tmp_path / "one", recipe, device="cpu")
    here, there = (open_checkpoint(tmp_path / name).manifest for name in ("one", "two"))
    assert here is not None
    assert there is not None
    assert there.measured["ranks"] == 2
    assert there.device == NAME
    assert there.measured["peak_device_bytes"] == 1 << 20
    assert here.digests == there.digests


def test_what_goes_to_a_device_goes_with_all_that_it_holds() -> None:
    """As solutions do that processes send to each other."""
    q = QTensor(
        Scheme.parse("w4a16g32"),
        torch.zeros(2, 32, dtype=torch.uint8),
        torch.ones(2, 1),
        lowrank=Factors(torch.ones(2, 1), torch.ones(1, 32)),
    )
    sent = {("a", None): Solution(q, 1.0, 2.0, 3.0, 4.0), "b": (State(), [torch.ones(1)])}
    with Rehearsal() as rehearsal:
        there = device.moved(sent, GPU)
        solution = there["a", None]
        assert solution.lost == 1.0
        tensors = [solution.value.codes, solution.value.scale, solution.value.lowrank.left, there["b"][1][0]]
        assert all(tensor.device == GPU for tensor in tensors)
        assert device.moved(there, GPU)["a", None] is solution
        back = device.moved(there, device.CPU)["a", None].value
        assert back.lowrank.right.device == device.CPU
        assert rehearsal.reads["device.moved: cpu"] == 5


def test_the_rehearsal_finds_what_it_is_for() -> None:
    here = torch.ones(3)
    with Rehearsal() as rehearsal:
        there = here.to("cuda")
        assert (there + 1).device == torch.zeros(2, device="cuda").device == GPU
        assert here.device == there.cpu().device == device.CPU
        with pytest.raises(RuntimeError, match="two devices"):
            there + here
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        rehearsal.reads.clear()
        assert bool(there.sum() == 3)
        assert there[there > 2].numel() == 0
        assert sum(rehearsal.reads.values()) == 2


# An option that nothing reads is an error.


def read_of(name: str, path: Path) -> set[str]:
    """Attributes that a file reads of what it calls `name`, or of an attribute of that name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            called = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if called == name:
                found.add(node.attr)
    return found


def test_every_field_of_the_context_is_read() -> None:
    read = {name for path in (ROOT / "compress").rglob("*.py") for name in read_of("ctx", path)}
    contract = next(n for n in ast.parse((ROOT / "compress/context.py").read_text()).body if getattr(n, "name", "") == "Context")
    read |= {n.attr for n in ast.walk(contract) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    assert {field.name for field in fields(Context)} <= read


@pytest.mark.parametrize("name", pass_files())
def test_every_option_of_a_pass_is_read(name: str) -> None:
    cls: type[Pass] = load_pass(name)
    modules = {base.__module__ for base in cls.__mro__ if base.__module__.startswith("compress")}
    read: set[str] = set()
    for module in modules:
        room = "passes" if module.startswith("compress.passes") else "compress"
        path = (
            ROOT / room / module.removeprefix(f"compress.{'passes.' if room == 'passes' else ''}").replace(".", "/")
        ).with_suffix(".py")
        tree_ = ast.parse(path.read_text())
        read |= {node.attr for node in ast.walk(tree_) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
        # Of several alike, by their names.
        read |= {node.value for node in ast.walk(tree_) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        if "**self.model_dump()" in path.read_text():
            read |= {name for file in (ROOT / "compress/corpus").glob("*.py") for name in read_of("spec", file)}
    assert cls.model_fields.keys() <= read, sorted(cls.model_fields.keys() - read)


def test_every_option_of_a_command_is_read() -> None:
    from compress.cli import passes
    from compress.cli.run import RunFlags

    seen: set[str] = set()
    for path in sorted((ROOT / "compress/cli").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or node.name not in ("command", "execute", "context"):
                continue
            seen.add(node.name)
            read = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            # Tracebacks are the guard's, who looks at the command line itself.
            given = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)} - {"debug"}
            assert given <= read, f"{path.name}: {sorted(given - read)}"
            if node.name == "execute":
                flags = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "flags"}
                assert flags == {field.name for field in fields(RunFlags)}
                assert passes._COMMON.keys() - {"debug"} == flags - {"steps", "keep"}
    assert seen == {"command", "execute", "context"}
