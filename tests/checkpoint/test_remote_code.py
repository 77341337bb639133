"""Trust: code of a checkpoint's own runs only where the user says so, every file is told, and the model stays itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.architecture.weight_map import meta_model, resolve
from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import open_checkpoint
from compress.checkpoint.remote_code import NOTE, OPTION, code_of
from compress.context import Context
from compress.corpus.encoder import Encoder
from compress.corpus.spec import CorpusSpec
from compress.errors import CompressError, InputError, MachineError
from compress.evaluate.verify import read_with
from compress.layerwise.model import build
from compress.pipeline.run import Options, Result, run_recipe
from compress.spec.recipe import parse_one_liner
from custom import FILES, tiny_custom
from forked import compress
from support import logits, tiny_llama

RTN = "quantize.rtn(scheme=w4a16g32)"
TOKENIZER = """
from transformers import PreTrainedTokenizerFast


class TinyTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def model(tmp_path: Path, demo_model: Path) -> Path:
    return tiny_custom(tmp_path / "model", demo_model, str(tmp_path / "ran"))


def trusted_run(source: Path, out: Path, recipe: str, told: list[dict[str, Any]] | None = None) -> Result:
    """Runs a one-liner over a directory whose code may run; events of code go into `told`."""
    ctx = Context(threads=2, events=lambda event: told.append(event) if told is not None and event["event"] == "code" else None)
    return run_recipe(parse_one_liner(recipe), open_checkpoint(source, trusted=True), out, ctx, Options())


def change(file: Path, **entries: Any) -> None:
    """Sets entries of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize("verb", ["plan", "run", "generate", "eval", "verify"])
def test_it_is_refused_without_the_option(verb: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a text. " * 100)
    arguments = {
        "plan": ["-p", RTN], "run": [tmp_path / "out", "-p", RTN], "generate": ["--prompt", "def"],
        "eval": ["--data", tmp_path / "t.txt", "--length", "16"], "verify": ["--reader", "ours"],
    }  # fmt: skip
    done = compress(verb, model, *arguments[verb])
    assert done.returncode == 3, done.stderr
    assert "modeling_tiny.TinyForCausalLM) is not run" in done.stderr
    assert OPTION in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"model", "t.txt"}


def test_the_option_runs_it_and_names_every_file(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    recipe = f"calibrate(data='{tmp_path}/t.txt', samples=4, length=32) | quantize.gptq(scheme=w4a16g32) | pack"
    done = compress("run", model, out, "-p", recipe, "--json", OPTION)
    assert done.returncode == 0, done.stderr
    digests = {file: hashlib.sha256((model / file).read_bytes()).hexdigest() for file in FILES}
    for file, digest in digests.items():
        assert f"{file}, sha256 {digest}" in done.stderr
    told = next(event for line in done.stdout.splitlines() if (event := json.loads(line))["event"] == "code")
    assert told["files"] == digests

    manifest = Manifest.read(out)
    assert manifest is not None
    assert {file: manifest.files[file] for file in FILES} == digests
    assert [(note.count, set(note.names)) for note in manifest.notes if note.what == NOTE] == [(3, set(FILES))]
    assert all("code" in step.inputs for step in manifest.lineage)
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"] == json.loads((model / "config.json").read_text())["auto_map"]

    checked = compress("verify", out, "--reader", "transformers", OPTION)
    assert checked.returncode == 0, checked.stderr
    assert "logits:   equal" in checked.stdout
    spoken = compress("generate", out, "--prompt", "def", "--new-tokens", "2", OPTION)
    assert spoken.returncode == 0, spoken.stderr
    assert spoken.stderr.count(", sha256 ") == 3
    measured = compress("eval", out, "--against", model, "--data", tmp_path / "t.txt", "--tokens", "64", "--length", "32", OPTION)
    assert measured.returncode == 0, measured.stderr
    assert measured.stderr.count(", sha256 ") == 6
    planned = compress("plan", model, "-p", RTN, OPTION)
    assert planned.returncode == 0, planned.stderr
    assert "tiny_custom" in planned.stdout


def test_logits_are_those_of_transformers(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = trusted_run(model, tmp_path / "out", f"{RTN} | pack").out
    for directory in (model, out):
        theirs = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, local_files_only=True, dtype="float32")
        ours = build(open_checkpoint(directory, trusted=True), rounded=directory == model)
        assert type(theirs).__name__ == type(ours).__name__ == "TinyForCausalLM"
        torch.testing.assert_close(logits(ours), logits(theirs.eval()), rtol=1e-4, atol=1e-5)
    assert read_with("transformers", out, torch.randint(3, 128, (2, 16)), lambda line: None, trusted=True).equal


def test_a_class_of_transformers_is_taken_without_it(tmp_path: Path) -> None:
    """Many models bring code that transformers has by now: without the option its own class computes."""
    source = tiny_custom(tmp_path / "model", ran=str(tmp_path / "ran"))
    change(source / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    assert type(meta_model(open_checkpoint(source))).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_with_and_without_it_are_two_results(tmp_path: Path) -> None:
    source = tiny_custom(tmp_path / "model")
    change(source / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    run_recipe(parse_one_liner(RTN), open_checkpoint(source), tmp_path / "out", Context(threads=2))
    with pytest.raises(InputError, match="another result"):
        trusted_run(source, tmp_path / "out", RTN)


def test_the_line_lasts_and_is_said_once(model: Path, tmp_path: Path) -> None:
    first = trusted_run(model, tmp_path / "first", RTN).out
    last = trusted_run(first, tmp_path / "last", "pack")
    assert [note.count for note in last.manifest.notes if note.what == NOTE] == [3]


def test_a_teachers_code_is_told_too(model: Path, tmp_path: Path, demo_model: Path) -> None:
    student = tmp_path / "student"
    tiny_llama(student, vocab_size=json.loads((model / "config.json").read_text())["vocab_size"])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (student / file).write_bytes((model / file).read_bytes())
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    told: list[dict[str, Any]] = []
    recipe = f"distill.logits(teacher='{model}', data='{tmp_path}/t.txt', samples=2, length=16, batch=2)"
    result = trusted_run(student, tmp_path / "out", recipe, told)
    assert [(event["model"], set(event["files"])) for event in told] == [("model", set(FILES))]
    assert [note.reason for note in result.manifest.notes if note.what == NOTE] == [f"Python of the teacher, allowed by {OPTION}"]


BAD = {
    "another repository": ("config.json", {"auto_map": {"AutoConfig": "owner/repo--configuration_tiny.TinyConfig"}}, "'--'"),
    "a path": ("config.json", {"auto_map": {"AutoConfig": "../other/configuration.TinyConfig"}}, "module.Class"),
    "no class": ("config.json", {"auto_map": {"AutoConfig": {}}}, "module.Class"),
    "no object": ("config.json", {"auto_map": "configuration_tiny.TinyConfig"}, "an object in auto_map"),
    "no such class": ("config.json", {"auto_map": {"AutoConfig": "configuration_tiny.Nothing"}}, "defines Nothing"),
    "another kind": ("config.json", {"auto_map": {"AutoConfig": "modeling_tiny.TinyForCausalLM"}}, "PreTrainedConfig"),
    "no file": ("config.json", {"auto_map": {"AutoConfig": "elsewhere.TinyConfig"}}, "beside it"),
    "no model": ("config.json", {"architectures": ["Other"]}, "a class in auto_map"),
    "a tokenizer's": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a/b--c.D", None]}}, "'--'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_references_are_refused_with_the_option(case: str, model: Path) -> None:
    file, entries, said = BAD[case]
    change(model / file, **entries)
    with pytest.raises(InputError) as caught:
        resolve(open_checkpoint(model, trusted=True))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("import a_library_that_is_not_here\n", MachineError, "a_library_that_is_not_here"),
        ("raise RuntimeError('no')\n", InputError, "RuntimeError: no"),
        ("from .gone import x\n", InputError, "gone.py"),
        ("def f(:\n", InputError, "SyntaxError"),
        ("\0", InputError, "modeling_tiny.py"),
    ],
)
def test_code_that_does_not_run(text: str, kind: type[CompressError], said: str, model: Path) -> None:
    (model / "modeling_tiny.py").write_text(text)
    with pytest.raises(kind) as caught:
        resolve(open_checkpoint(model, trusted=True))
    assert said in str(caught.value)


def test_a_tokenizer_of_its_own(tmp_path: Path, demo_model: Path) -> None:
    folder = tmp_path / "model"
    tiny_llama(folder)
    (folder / "tokenizer.json").write_bytes((demo_model / "tokenizer.json").read_bytes())
    auto_map = {"AutoTokenizer": [None, "tokenization_tiny.TinyTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TinyTokenizer", "auto_map": auto_map}))
    (folder / "tokenization_tiny.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{TOKENIZER}")
    spec = CorpusSpec(("-",), join="none", bos="never")
    with pytest.raises(InputError, match=r"tokenization_tiny\.TinyTokenizer.*--trust-remote-code"):
        Encoder(spec, folder)
    assert not (tmp_path / "ran").exists()
    assert list(code_of(open_checkpoint(folder, trusted=True))) == ["tokenization_tiny.py"]
    assert type(Encoder(spec, folder, trusted=True).tokenizer).__name__ == "TinyTokenizer"
    assert (tmp_path / "ran").exists()
