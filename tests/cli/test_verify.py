"""verify and formats ls as a user types them: what they print, and their exit statuses."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint import atomic
from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import open_checkpoint
from compress.cli.app import build
from compress.errors import FormatError
from compress.evaluate import readers, records
from compress.kernels.dispatch import formats
from forked import compress
from support import run, step_of

WEIGHT = "model.layers.1.mlp.down_proj.weight"
PART = WEIGHT.removesuffix("weight")
SYMMETRIC, ASYMMETRIC = "quantize.rtn(scheme=w4a16g32)", "quantize.rtn(scheme=w4a16g32-asym, least_zero=1)"
Said = tuple[int, str, str]


def remarks(err: str) -> list[str]:
    """What stderr says besides how far things are."""
    return [line for line in err.splitlines() if not re.fullmatch(r"(read|verify: ).*( in \d+\.\d s|, \d+:\d\d.*)", line)]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """The same in this process, which has its imports behind it: status, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Said:
        filled = list(map(str, arguments))
        with pytest.raises(SystemExit) as end:
            build(filled)(filled)
        return (int(end.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def artifacts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each; do not write into them."""
    recipes = {
        "compressed-tensors": f"{SYMMETRIC} | pack",
        "gptq": f"{SYMMETRIC} | pack(format=gptq)",
        "gptq-asym": f"{ASYMMETRIC} | pack(format=gptq)",
        "awq": f"{ASYMMETRIC} | pack(format=awq)",
        "masked": f"prune.magnitude(sparsity=2:4) | {SYMMETRIC} | pack",
    }
    folder = tmp_path_factory.mktemp("artifacts")
    for name, recipe in recipes.items():
        run(tiny, folder / name, recipe)
    return {name: folder / name for name in recipes}


def told(artifact: Path, target: Path, **quantization: Any) -> Path:
    """A copy whose config.json says something else of its codes; the manifest still names the old file."""
    shutil.copytree(artifact, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= quantization
    (target / "config.json").write_text(json.dumps(config))
    return target


def resealed(directory: Path) -> Path:
    """Makes the manifest name the bytes that are there: only what they mean is then wrong."""
    content = json.loads((directory / "manifest.json").read_text())
    content["files"] = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in content["files"]}
    checkpoint = open_checkpoint(directory)
    content["digests"] = {n: hashlib.sha256(b"".join(map(bytes, checkpoint.chunks(n)))).hexdigest() for n in checkpoint.refs}
    (directory / "manifest.json").write_text(Manifest.model_validate_json(json.dumps(content)).sealed().to_text())
    return directory


def fingerprint(directory: Path) -> str:
    manifest = Manifest.read(directory)
    assert manifest is not None
    return manifest.fingerprint


def unnamed(directory: Path) -> Path:
    (directory / "manifest.json").unlink()
    return directory


def test_verify_as_a_user_types_it(artifacts: dict[str, Path]) -> None:
    done = compress("verify", artifacts["gptq"])
    assert (done.returncode, remarks(done.stderr)) == (0, [])
    tensors = len(open_checkpoint(artifacts["gptq"]).refs)
    assert done.stdout.splitlines() == [
        f"bytes:    {tensors} tensors, as manifest.json names them",
        "decodes:  14 packed weights, all finite",
    ]


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq-asym", "awq", "masked"])
def test_every_format_holds(name: str, artifacts: dict[str, Path], tmp_path: Path, here: Callable[..., Said]) -> None:
    status, out, err = here("verify", artifacts[name])
    assert (status, remarks(err)) == (0, [])
    assert "as manifest.json names them\ndecodes:  14 packed weights, all finite\n" in out
    shutil.copytree(artifacts[name], tmp_path / "foreign")
    status, out, err = here("verify", unnamed(tmp_path / "foreign"))
    assert (status, remarks(err)) == (0, [])
    assert "no manifest to compare them with\ndecodes:  14 packed weights, all finite\n" in out


def test_checkpoints_in_other_states(tiny: Path, artifacts: dict[str, Path], here: Callable[..., Said]) -> None:
    status, out, _ = here("verify", tiny)
    assert status == 0
    assert "no manifest to compare them with\ndecodes:  nothing is packed\n" in out
    status, out, _ = here("verify", step_of(artifacts["masked"], "quantize.rtn"))
    assert status == 0
    assert "as manifest.json names them\ndecodes:  14" in out


def flipped(artifact: Path, target: Path) -> Path:
    shutil.copytree(artifact, target)
    file = target / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 4
    file.write_bytes(content)
    return target


def test_a_flipped_byte(artifacts: dict[str, Path], tmp_path: Path, here: Callable[..., Said]) -> None:
    damaged = flipped(artifacts["gptq"], tmp_path / "damaged")
    status, out, err = here("verify", damaged)
    assert (status, out) == (3, "")
    assert "expected: the bytes that manifest.json names" in err
    one, other = (load_file(at / "model.safetensors") for at in (damaged, artifacts["gptq"]))
    changed = [name for name in one if not torch.equal(one[name], other[name])]
    assert len(changed) == 1
    assert f"'{changed[0]}'" in err
    (tmp_path / "damaged" / "generation_config.json").unlink()
    shutil.copyfile(artifacts["gptq"] / "model.safetensors", damaged / "model.safetensors")
    status, _, err = here("verify", damaged)
    assert status == 3
    assert "generation_config.json" in err
    assert "no such file" in err


CONFIGS: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "gptq: another group": ("gptq", {"group_size": 16}, 3, r"_proj\.scales"),
    "gptq: one group": ("gptq", {"group_size": -1}, 3, r"_proj\.scales"),
    "gptq: other bits": ("gptq", {"bits": 8}, 3, r"_proj\.q"),
    "gptq: zero points of version 2": ("gptq-asym", {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}, 5, r"_proj\.weight'"),
    "awq: another group": ("awq", {"group_size": 64}, 3, r"_proj\.scales"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_says_something_else(
    case: str, artifacts: dict[str, Path], tmp_path: Path, here: Callable[..., Said]
) -> None:

    name, said, status, pattern = CONFIGS[case]
    wrong = told(artifacts[name], tmp_path / "wrong", **said)
    found, _, err = here("verify", wrong)
    assert found == 3
    assert "config.json" in err, "the manifest knows another one"
    found, _, err = here("verify", resealed(wrong))
    assert found == status, err
    assert re.search(pattern, err), err
    if status == 3:
        # The layout gives it away by itself.
        found, _, err = here("verify", unnamed(wrong))
        assert found == 3, err
        assert re.search(pattern, err), err


def test_what_a_compressed_tensors_group_says(artifacts: dict[str, Path], tmp_path: Path, here: Callable[..., Said]) -> None:
    config = json.loads((artifacts["compressed-tensors"] / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    group["weights"]["group_size"] = 64
    wrong = told(artifacts["compressed-tensors"], tmp_path / "wrong", config_groups={"group_0": group})
    for change in (resealed, unnamed):
        status, _, err = here("verify", change(wrong))
        assert status in (3, 5), err
        assert "_proj.weight" in err


def test_zeros_that_were_promised(artifacts: dict[str, Path], tmp_path: Path, here: Callable[..., Said]) -> None:
    shutil.copytree(artifacts["masked"], tmp_path / "lost")
    file = tmp_path / "lost" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{WEIGHT}_packed"][:] = 0
    save_file(tensors, file, {"format": "pt"})
    status, _, err = here("verify", resealed(tmp_path / "lost"))
    assert status == 5
    assert f"'{WEIGHT}'" in err
    assert "the zeros of masked(2:4)" in err


def test_a_scale_that_is_no_number(artifacts: dict[str, Path], tmp_path: Path, here: Callable[..., Said]) -> None:
    shutil.copytree(artifacts["gptq"], tmp_path / "nan")
    file = tmp_path / "nan" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{PART}scales"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    for change in (resealed, unnamed):
        status, _, err = here("verify", change(tmp_path / "nan"))
        assert status == 3
        assert f"'{PART}scales'" in err


def test_a_label_that_is_wrong_is_read_by_what_is_stored_and_told(
    artifacts: dict[str, Path], tmp_path: Path, here: Callable[..., Said]
) -> None:
    wrong = unnamed(told(artifacts["gptq"], tmp_path / "wrong", checkpoint_format="gptq_v2", format="gptq_v2"))
    status, out, err = here("verify", wrong)
    assert (status, remarks(err)) == (0, [])
    assert "note:     14 weights: its zero points are those of the other checkpoint_format than the label says" in out
    status, out, _ = here("verify", wrong, "--json")
    assert json.loads(out)["bytes"]["corrected"][0][1] == 14


def test_transformers_reads_what_is_meant(artifacts: dict[str, Path], here: Callable[..., Said]) -> None:
    pytest.importorskip("compressed_tensors")
    status, out, err = here("verify", artifacts["compressed-tensors"], "--reader", "transformers")
    assert status == 0, err
    assert remarks(err) == ["transformers reads compressed-tensors"]
    lines = out.splitlines()
    assert lines[2].startswith("reader:   transformers (torch ")
    assert "compressed-tensors 0." in lines[2]
    assert lines[3].startswith("logits:   equal up to rounding in bfloat16: largest difference ")
    assert lines[3].endswith("same top-1 100.0%, 256 tokens")
    assert lines[4] == f"kept:     {artifacts['compressed-tensors'] / 'verification.json'}"
    record = records.verification(artifacts["compressed-tensors"], fingerprint(artifacts["compressed-tensors"]))
    assert record is not None
    (found,) = record.passed.values()
    assert [*record.passed] == ["transformers"]
    assert f"transformers {found.version}" in lines[2]
    assert (found.tokens, found.top1, found.dtype) == (256, 1, "bfloat16")


def test_json(artifacts: dict[str, Path], here: Callable[..., Said]) -> None:
    status, out, err = here("verify", artifacts["awq"], "--reader", "ours", "--reader", "ours", "--dtype", "float32", "--json")
    assert (status, remarks(err)) == (0, [])
    facts = json.loads(out)
    assert facts["bytes"] == {
        "tensors": len(open_checkpoint(artifacts["awq"]).refs), "named": True, "decoded": 14, "corrected": [],
    }  # fmt: skip
    assert [reading["reader"] for reading in facts["readers"]] == ["ours", "ours"]
    assert all(reading["equal"] and reading["difference"] == 0 and reading["dtype"] == "float32" for reading in facts["readers"])
    status, out, _ = here("verify", artifacts["awq"] / "nowhere", "--json")
    assert (status, json.loads(out)["kind"]) == (3, "InputError")


def test_logits_on_a_text(demo_model: Path, here: Callable[..., Said]) -> None:
    text = demo_model.parent / "text" / "evaluation.jsonl"
    status, out, err = here("verify", demo_model, "--reader", "ours", "--data", text)
    assert status == 0, err
    assert "same top-1 100.0%, 256 tokens" in out


def test_a_reader_that_computes_something_else(
    artifacts: dict[str, Path], here: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = readers.logits

    def other(reader: str, *arguments: Any, **named: Any) -> readers.Reading:
        found = real("ours", *arguments, **named)
        return found if reader == "ours" else replace(found, logits=found.logits.roll(1, 0))

    monkeypatch.setattr(readers, "logits", other)
    status, out, err = here("verify", artifacts["gptq"], "--reader", "auto-gptq")
    assert status == 5
    assert "decodes:  14" in out, "the first two questions have their answers"
    assert "error: gptq, read by auto-gptq\n" in err
    assert "do not use it with this reader" in err
    record = records.verification(artifacts["gptq"], fingerprint(artifacts["gptq"]))
    assert record is not None
    assert (record.passed, [*record.readers]) == ({}, ["auto-gptq"])
    assert "same top-1" in record.readers["auto-gptq"].reason


@pytest.mark.usefixtures("warm")
def test_what_cannot_be_kept_is_said(
    artifacts: dict[str, Path], tmp_path: Path, here: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors")
    place = shutil.copytree(artifacts["compressed-tensors"], tmp_path / "read only")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", full)
    status, out, err = here("verify", place, "--reader", "transformers")
    assert status == 0
    assert "kept:" not in out
    assert f"note: not kept: {place / 'verification.json'}: No space left on device\n" in err
    assert not [path for path in place.iterdir() if path.suffix == ".draft"]


WRONG = {
    "unknown reader": (["{gptq}", "--reader", "autogptq"], 2, "did you mean 'auto-gptq'?"),
    "unknown dtype": (["{gptq}", "--reader", "ours", "--dtype", "fp16"], 2, "--dtype"),
    "no such artifact": (["{gptq}/nowhere"], 3, "no such directory"),
    "no artifact": ([], 2, "Missing argument"),
    "no such text": (["{gptq}", "--reader", "ours", "--data", "./none.txt"], 3, "no such file"),
    "no base": (["{gptq}", "--reader", "peft"], 3, "adapter_config.json"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_and_has_a_status(case: str, artifacts: dict[str, Path], here: Callable[..., Said]) -> None:
    arguments, status, said = WRONG[case]
    found, _, err = here("verify", *(argument.format(**artifacts) for argument in arguments))
    assert found == status, err
    assert said in err


def test_a_folder_that_is_not_there_is_no_hub_id() -> None:
    done = compress("verify", "./nowhere")
    assert done.returncode == 3, done.stderr
    assert "no such directory" in done.stderr


def test_a_config_by_which_nothing_is_packed(artifacts: dict[str, Path], tmp_path: Path, here: Callable[..., Said]) -> None:
    wrong = told(artifacts["compressed-tensors"], tmp_path / "wrong", ignore=["re:.*"])
    status, _, err = here("verify", resealed(wrong))
    assert status in (3, 5)
    assert "_proj" in err


@pytest.mark.usefixtures("warm")
def test_transformers_finds_nothing_where_nothing_is_packed(
    artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a look at the config finds first, the reader's own code finds too."""
    pytest.importorskip("compressed_tensors")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    wrong = resealed(told(artifacts["compressed-tensors"], tmp_path / "wrong", ignore=["re:.*"]))
    with pytest.raises(FormatError, match="missing keys: model"):
        readers.logits("transformers", wrong, torch.zeros(1, 4, dtype=torch.int64), lambda line: None)


@pytest.mark.usefixtures("warm")
def test_what_is_expanded_at_load_in_a_wider_dtype(tiny: Path, tmp_path: Path, here: Callable[..., Said]) -> None:
    pytest.importorskip("compressed_tensors")
    run(tiny, tmp_path / "artifact", "quantize.rtn(scheme=w4a16g32-asym) | pack(dequantize=true)")
    status, _, err = here("verify", tmp_path / "artifact", "--reader", "transformers", "--dtype", "float32")
    assert status == 0, err


def test_formats_ls(here: Callable[..., Said]) -> None:
    done = compress("formats", "ls")
    assert (done.returncode, remarks(done.stderr)) == (0, [])
    for name in formats():
        assert any(line.split()[:1] == [name] for line in done.stdout.splitlines()), name
    assert "only" not in done.stdout
    status, out, err = here("formats", "ls", "--details")
    assert (status, remarks(err)) == (0, [])
    assert "refused: its readers know 4-bit codes only" in out or "refused: " in out
    status, out, err = here("formats", "ls", "--json")
    assert (status, remarks(err)) == (0, [])
    found = json.loads(out)
    assert set(found) == set(formats())
    assert set(found["awq"]["w8a16g64"]) == {""}
    assert found["awq"]["w4a16g64-asym"]["vllm"][0] == "yes"
    assert found["gptq"]["w3a16g64"]["auto-gptq"][0] == "yes"
    assert "w8a16g64-asym, dequantize" in found["compressed-tensors"]
    assert found["compressed-tensors"]["w4a16g64-asym"]["vllm"][0] == "yes"
    assert found["compressed-tensors"]["w4a16g64-asym"]["transformers"][0] == "no"
    assert found["compressed-tensors"]["w4a16g64"]["transformers"][0] == "yes"
