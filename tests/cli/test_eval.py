"""eval, diff and generate as a user types them: what they print, and their exit statuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import device
from compress.checkpoint.reader import open_checkpoint
from compress.cli.app import build
from compress.errors import InputError
from compress.evaluate import records
from compress.layerwise.sample import sample
from compress.runtime import compiled_step
from families import build as build_family
from forked import compress
from support import run, step_of


def ok(*arguments: object) -> str:
    done = compress(*arguments)
    assert done.returncode == 0, done.stderr
    # Nothing but how far it is.
    assert [line for line in done.stderr.splitlines() if not re.match(r"(read|eval|knowledge|diff|still at work)\b", line)] == []
    return done.stdout


@pytest.fixture(scope="module")
def packed(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval") / "packed"
    run(
        demo_model,
        out,
        "prune.magnitude(sparsity=2:4, targets=[attention]) | quantize.rtn(scheme=w4a16g32, targets=[mlp]) | pack",
    )
    return out


@pytest.fixture(scope="module")
def text(demo_model: Path) -> Path:
    return demo_model.parent / "text" / "evaluation.jsonl"


@pytest.fixture
def damaged(demo_model: Path, tmp_path: Path) -> Path:
    """The embedded model with a NaN in it."""
    shutil.copytree(demo_model, tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = math.nan
    save_file(tensors, file, {"format": "pt"})
    return tmp_path / "damaged"


def test_eval_prints_numbers_with_errors_and_the_protocol(demo_model: Path, packed: Path, text: Path) -> None:
    said = ok("eval", packed, "--against", demo_model, "--data", text, "--tokens", 2100, "--length", 128)
    for word in (
        "perplexity of the source", "KL(source || artifact), mean", "KL, median", "KL, 99th percentile", "same top-1", "+-",
        "artifact: packed", "source:   model", "data:     evaluation.jsonl", "first 2,048 tokens, windows of 128 without overlap",
        "fp32, no BOS, first token of a window not scored", "KL in nats per token", "16 windows, taken as independent",
    ):  # fmt: skip
        assert word in said
    facts = json.loads(ok("eval", packed, "--against", demo_model, "--data", text, "--tokens", 2048, "--length", 128, "--json"))
    assert facts["kl"]["value"] > facts["kl_median"]["value"] > 0
    assert facts["perplexity"]["value"] > facts["source_perplexity"]["value"]
    assert (facts["windows"], facts["scored"]) == (16, 16 * 127)
    assert f"{facts['kl']['value']:.6f}" in said
    assert f"{facts['top1']['value']:.2%}" in said


def test_eval_of_one_model(packed: Path, text: Path) -> None:
    said = ok("eval", packed, "--data", text, "--tokens", 256, "--batch", 1)
    assert "KL" not in said
    assert "source" not in said
    facts = json.loads(ok("eval", packed, "--data", text, "--tokens", 256, "--json"))
    assert facts["kl"] == {"value": None, "error": None}
    assert facts["perplexity"]["error"] is None, "one window"


def test_eval_of_a_model_that_compress_has_not_made(demo_model: Path, text: Path) -> None:
    facts = json.loads(ok("eval", demo_model, "--data", text, "--tokens", 256, "--json"))
    assert facts["perplexity"]["value"] > 1
    assert facts["kept"] is None


def test_diff_is_the_relative_error_of_what_each_side_means(demo_model: Path, packed: Path) -> None:
    facts = json.loads(ok("diff", demo_model, packed, "--json", "--worst"))
    errors = [weight["error"] for weight in facts["weights"]]
    assert errors == sorted(errors, reverse=True)
    source, pruned = (load_file(d / "model.safetensors") for d in (demo_model, step_of(packed, "prune.magnitude")))
    manifest = json.loads((packed / "manifest.json").read_text())["weights"]
    lost = norm = 0.0
    for weight in facts["weights"]:
        name, state = weight["name"], weight["states"][1]
        assert weight["states"][0] == "dense"
        a = source[name].double()
        norm += float(a.square().sum())
        if "self_attn" in name:
            assert state == "masked(2:4)"
            assert weight["error"] == pytest.approx(float((a - pruned[name].double()).norm() / a.norm()))
        elif "mlp" in name:
            assert state == "codes(w4a16g32)"
            assert weight["error"] == pytest.approx(manifest[name]["error"], rel=1e-3)
        else:
            assert (state, weight["error"]) == ("dense", 0)
        lost += (weight["error"] * float(a.norm())) ** 2
    assert facts["error"] == pytest.approx(math.sqrt(lost / norm))
    assert facts["equal"] == 10
    assert facts["only"] == {"a": [], "b": []}
    said = ok("diff", demo_model, packed)
    assert said.splitlines()[2].split()[0] == facts_in_order(demo_model)[0]
    assert f"total:    {facts['error']:.6f} over 38 weights, 10 of them equal" in said


def facts_in_order(directory: Path) -> list[str]:
    from compress.checkpoint.reader import open_checkpoint

    return list(open_checkpoint(directory).logical)


def test_diff_lists_what_it_cannot_compare(demo_model: Path, damaged: Path) -> None:
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(5)
    tensors["extra"] = tensors.pop("model.layers.3.mlp.up_proj.weight")
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    lines = ok("diff", demo_model, damaged, "--worst").splitlines()
    assert lines[2].split() == ["model.layers.1.mlp.up_proj.weight", "dense", "dense", "nan"]
    assert "error:    'model.norm.weight' is [128] in A, [5] in B: not compared" in lines
    assert [x for x in lines if x.startswith("only A")] == [
        "only A:   'model.layers.3.mlp.up_proj.weight'",
        "only A:   1 weights",
    ]
    assert [x for x in lines if x.startswith("only B")] == ["only B:   'extra'", "only B:   1 weights"]
    facts = json.loads(ok("diff", demo_model, damaged, "--json"))
    assert facts["error"] is None
    assert facts["shapes"] == [{"name": "model.norm.weight", "a": [128], "b": [5]}]


def test_generate_goes_on_from_a_prompt(demo_model: Path, packed: Path) -> None:
    said = ok("generate", packed, "--prompt", "import os\n", "--new-tokens", 12)
    assert said.startswith("import os\n")
    assert len(said) > len("import os\n\n")
    assert said == ok("generate", packed, "--prompt", "import os\n", "--new-tokens", 12, "--seed", 5)
    # The artifact is compressed-tensors': packed anew, it says the same.
    assert said == ok(
        "generate", packed, "--prompt", "import os\n", "--new-tokens", 12, "--packed", "--repack", "--dtype", "float32"
    )  # fmt: skip
    drawn = [ok("generate", demo_model, "--prompt", "def ", "--temperature", 1, "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("tokens", [12, 1])
def test_generate_compiles_what_runs_packed(
    tokens: int, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, where graphs are run by torch as they are: no C++ is compiled."""
    monkeypatch.setattr(compiled_step, "BACKEND", "eager")
    run(demo_model, tmp_path / "out", "quantize.rtn(scheme=w4a16g32) | pack(format=native)")
    said = []
    for more in ([], ["--compile"]):
        words = ["generate", str(tmp_path / "out"), "--prompt", "import os\n", "--new-tokens", str(tokens), "--packed", *more]
        build(words)(words, standalone_mode=False)
        said.append(capsys.readouterr())
    assert said[1].out == said[0].out
    assert said[0].err == ""
    told = r"compiled: a step of one token, in \d+\.\d s\n" if tokens > 1 else "compiled: nothing: all that is new .*\n"
    assert re.fullmatch(told, said[1].err)


def test_generate_compiles_for_the_cpu_only(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "resolve", lambda name: torch.device("cuda:0"))
    words = ["generate", str(demo_model), "--prompt", "a", "--packed", "--compile", "--device", "cuda"]
    with pytest.raises(SystemExit) as stopped:
        build(words)(words, standalone_mode=False)
    assert stopped.value.code == 2
    assert "--compile" in capsys.readouterr().err


@pytest.mark.parametrize(("family", "said"), [("t5", None), ("bert", "BertForMaskedLM"), ("whisper", "WhisperFor")])
def test_models_of_other_kinds(family: str, said: str | None, demo_model: Path, tmp_path: Path) -> None:
    source = build_family(family, tmp_path)
    tokenizer = json.loads((demo_model / "tokenizer.json").read_text())
    # The first ids only: these models know 128.
    model = tokenizer["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < 128}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copyfile(demo_model / "tokenizer_config.json", source / "tokenizer_config.json")
    if said is None:
        assert isinstance(sample(open_checkpoint(source), "a = 1", 5), str)
    else:
        with pytest.raises(InputError, match=said):
            sample(open_checkpoint(source), "a = 1", 5)


WRONG = {
    "eval: no data": (["eval", "{model}"], 2, "--data"),
    "eval: no such text": (["eval", "{model}", "--data", "{tmp}/none.txt"], 3, "no such file"),
    "eval: a table": (["eval", "{model}", "--data", "{tmp}/data.csv"], 2, ".csv"),
    "eval: no field text": (["eval", "{model}", "--data", "{tmp}/field.jsonl"], 3, "set field"),
    "eval: too little text": (["eval", "{model}", "--data", "{tmp}/short.txt"], 3, "tokens"),
    "eval: fewer tokens than asked for": (["eval", "{model}", "--data", "{text}", "--tokens", "99999"], 3, "at least 99,999"),
    "eval: less than a window": (["eval", "{model}", "--data", "{text}", "--tokens", "100"], 2, "at least a window of 256"),
    "eval: a window beyond the positions": (["eval", "{model}", "--data", "{text}", "--length", "513"], 2, "at most 512"),
    "eval: no window": (["eval", "{model}", "--data", "{text}", "--length", "1"], 2, "--length"),
    "eval: no such model": (["eval", "./nowhere", "--data", "{text}"], 3, "no such directory"),
    "eval: no such source": (["eval", "{model}", "--against", "./nowhere", "--data", "{text}"], 3, "no such directory"),
    "eval: another vocabulary": (["eval", "{model}", "--against", "{tiny}", "--data", "{text}"], 3, "a vocabulary of 128"),
    "eval: no tokenizer": (["eval", "{tiny}", "--data", "{text}"], 3, "no file of a tokenizer"),
    "eval: NaN in the artifact": (["eval", "{damaged}", "--against", "{model}", "--data", "{text}"], 3, "/damaged\n"),
    "eval: NaN in the source": (["eval", "{model}", "--against", "{damaged}", "--data", "{text}"], 3, "/damaged\n"),
    "diff: one side": (["diff", "{model}"], 2, "Missing argument"),
    "diff: no such model": (["diff", "{model}", "./nowhere"], 3, "no such directory"),
    "diff: nothing in common": (["diff", "{model}", "{other}"], 3, "none of them"),
    "diff: of another tool": (["diff", "{model}", "{foreign}"], 3, "quantized by gptq"),
    "generate: no prompt": (["generate", "{model}"], 2, "--prompt"),
    "generate: an empty prompt": (["generate", "{model}", "--prompt", ""], 2, "begin with a word"),
    "generate: no such model": (["generate", "./nowhere", "--prompt", "a"], 3, "no such directory"),
    "generate: beyond the positions": (["generate", "{model}", "--prompt", "a", "--new-tokens", "512"], 2, "at most 512"),
    "generate: a backend without --packed": (["generate", "{model}", "--prompt", "a", "--backend", "cpu"], 2, "--packed beside it"),
    "generate: compiled without --packed": (["generate", "{model}", "--prompt", "a", "--compile"], 2, "--packed beside it"),
    "generate: nothing packed": (["generate", "{model}", "--prompt", "a", "--packed"], 3, "native format"),
    "generate: an unknown dtype": (["generate", "{model}", "--prompt", "a", "--packed", "--dtype", "int9"], 2, "one of auto"),
    "generate: negative temperature": (["generate", "{model}", "--prompt", "a", "--temperature", "-1"], 2, "--temperature"),
    "generate: no temperature": (["generate", "{model}", "--prompt", "a", "--temperature", "inf"], 2, "a number from 0"),
    "generate: NaN": (["generate", "{damaged}", "--prompt", "a"], 3, "/damaged\n"),
    "generate: NaN, drawn": (["generate", "{damaged}", "--prompt", "a", "--temperature", "1"], 3, "/damaged\n"),
    "generate: no tokenizer": (["generate", "{tiny}", "--prompt", "a"], 3, "no file of a tokenizer"),
    "generate: of another tool": (["generate", "{foreign}", "--prompt", "a"], 3, "quantized by gptq"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_and_has_a_status(
    case: str, demo_model: Path, tiny: Path, text: Path, damaged: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In this process: most of them would spend their time on imports."""
    arguments, status, said = WRONG[case]
    (tmp_path / "data.csv").write_text("a,b\n")
    (tmp_path / "field.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "short.txt").write_text("import os")
    foreign = shutil.copytree(demo_model, tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    other = shutil.copytree(tiny, tmp_path / "other")
    save_file({"other": torch.ones(2)}, other / "model.safetensors", {"format": "pt"})
    places = {
        "model": demo_model,
        "tiny": tiny,
        "text": text,
        "tmp": tmp_path,
        "damaged": damaged,
        "foreign": foreign,
        "other": other,
    }
    monkeypatch.setenv("COLUMNS", "200")
    filled = [argument.format(**places) for argument in arguments]
    with pytest.raises(SystemExit) as end:
        build(filled)(filled)
    out, err = capsys.readouterr()
    assert end.value.code == status, err
    assert said in err
    assert out == ""


def test_errors_are_json_under_json(demo_model: Path, tmp_path: Path) -> None:
    done = compress("eval", demo_model, "--data", tmp_path / "none.txt", "--json")
    last = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, last["event"], last["kind"]) == (3, "error", "InputError")


def test_what_was_measured_is_kept_in_the_artifact(demo_model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(demo_model, out, "prune.magnitude(sparsity=2:4) | quantize.rtn(scheme=w4a16g32) | pack")
    asked = ("eval", out, "--against", demo_model, "--data", text, "--tokens", 256, "--length", 64)
    said = ok(*asked, "--stages")
    assert re.search(
        r"^step before +perplexity +\+- +KL +\+- +same top-1\n-+.*\nprune\.magnitude .*\nquantize\.rtn ", said, re.MULTILINE
    )
    assert said.endswith(f"kept:     {out / 'evaluation.json'}\nnext:     compress card {out} --write\n")
    found = records.evaluation(out, result.manifest.fingerprint)
    assert found is not None
    assert [record.step for record in found.quality] == [step.id for step in result.manifest.lineage]
    last = found.quality[-1]
    assert last.spread is not None
    assert sum(last.spread.counts) == last.scored == 252
    assert last.spread.quantiles["0.5"] == pytest.approx(last.kl_median.value, rel=1e-5)
    assert str(tmp_path) not in (out / "evaluation.json").read_text()
    facts = json.loads(ok(*asked, "--json"))
    assert facts["kept"] == str(out / "evaluation.json")
    assert len(json.loads((out / "evaluation.json").read_text())["quality"]) == 3, "the same measurement is replaced"
    # Steps that are gone, and bytes that are not those of the manifest.
    shutil.rmtree(tmp_path / "out.steps")
    done = compress(*asked, "--stages")
    assert done.returncode == 3
    assert "expected: steps that the run has kept" in done.stderr
    (out / "evaluation.json").unlink()
    (out / "generation_config.json").write_text("{}")
    done = compress(*asked)
    assert done.returncode == 0
    assert f"note: not kept: {out / 'generation_config.json'}: other bytes" in done.stderr
    assert "kept:" not in done.stdout
    assert not (out / "evaluation.json").exists()


def test_eval_needs_something_to_measure(demo_model: Path, tmp_path: Path) -> None:
    for options, said in (
        ((), "--data FILE or --tasks A,B"),
        (("--data", tmp_path / "x.jsonl", "--shots", 2), "--tasks beside it"),
        (("--tasks", " , "), "names between commas"),
        (("--tasks", "a", "--task-data", "a"), "TASK=FILE"),
    ):
        done = compress("eval", demo_model, *options)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr


def test_knowledge_says_what_was_lost(demo_model: Path, packed: Path, tmp_path: Path) -> None:
    rows = [{"relation": "r", "masked_sentence": "import [MASK]\n", "obj_label": word} for word in ("os", "json", "sys", "re")]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ("knowledge", packed, "--against", demo_model, "--data", tmp_path / "facts.jsonl")
    facts = json.loads(ok(*asked, "--json"))
    r, whole = facts["relations"]
    assert (r["relation"], r["facts"], r["candidates"], whole["relation"]) == ("r", 4, 4, "all")
    # The same sentence with four objects: one of them is the likeliest for each model.
    assert (r["source_known"], r["known"]) == (1, 1)
    assert len(facts["lost"]) == r["lost"] == len(facts["gained"]) == r["gained"]
    said = ok(*asked, "--details")
    for words in ("relation", "by chance 25.0% are known", "protocol: 4 facts, at most 4 candidates", "artifact: packed"):
        assert words in said
    assert said.count("lost:") == r["lost"]
    assert "source" not in ok("knowledge", packed, "--data", tmp_path / "facts.jsonl")
    done = compress("knowledge", packed, "--data", tmp_path / "none.jsonl")
    assert done.returncode == 3
    assert "none.jsonl" in done.stderr
