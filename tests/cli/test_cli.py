"""Every verb as a user types it: what it prints, and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compress.errors import UsageError
from compress.spec.byte_size import parse_size
from forked import compress


def ok(*arguments: object, cwd: Path | None = None) -> str:
    done = compress(*map(str, arguments), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def artifact(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    ok("run", tiny, out, "-p", "quantize.rtn(scheme=w4a16g32) | pack(format=compressed-tensors)")
    return out


def test_run_ends_with_where_before_after_bits_and_what_next(tiny: Path, tmp_path: Path) -> None:
    said = ok("run", tiny, tmp_path / "out", "rtn_w4", "--set", "quantize.rtn.scheme=w3a16g32")
    for word in ("where:", "before:", "after:", "bits:", "per targeted weight", "14 of 14 weights", "next:"):
        assert word in said
    assert "up to date" in ok("run", tiny, tmp_path / "out", "rtn_w4", "--set", "quantize.rtn.scheme=w3a16g32")


def test_a_recipe_file_may_name_its_model(tiny: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"version: 1\nmodel: {tiny}\npasses:\n- quantize.rtn: {{scheme: w8a16}}\n- pack: {{}}\n")
    assert "where:" in ok("run", "-", tmp_path / "out", recipe)


def test_events_are_json_lines(tiny: Path, tmp_path: Path) -> None:
    lines = [
        json.loads(line)
        for line in ok("run", tiny, tmp_path / "out", "rtn_w4", "--set", "1.scheme=w4a16g32", "--json").splitlines()
    ]
    kinds = [line["event"] for line in lines]
    assert kinds[0] == "start"
    assert kinds[-1] == "done"
    assert kinds.count("step") == 2
    assert lines[-1]["coverage"]["transformed"] == 14


def test_quiet_says_nothing(tiny: Path, tmp_path: Path) -> None:
    done = compress("run", str(tiny), str(tmp_path / "out"), "-p", "quantize.rtn(scheme=w8a16)", "--quiet")
    assert (done.returncode, done.stdout) == (0, "")


def test_a_pass_by_itself(tiny: Path, tmp_path: Path) -> None:
    said = ok(
        "quantize",
        "rtn",
        tiny,
        tmp_path / "codes",
        "--scheme",
        "w4a16g32",
        "--targets",
        "attention",
        "--skip",
        "re:.*o_proj",
        "--clip",
        "mse",
    )
    assert "6 of 6 weights" in said
    assert f"compress pack {tmp_path / 'codes'}" in said
    assert "where:" in ok("pack", tmp_path / "codes", tmp_path / "packed", "--format", "compressed-tensors")


def test_plan_prints_the_bytes_that_are_written(tiny: Path, artifact: Path) -> None:
    facts = json.loads(ok("plan", tiny, "-p", "quantize.rtn(scheme=w4a16g32) | pack", "--json", "--layers"))
    assert facts["steps"][-1]["disk_bytes"] == sum(
        (artifact / name).stat().st_size for name in ("model.safetensors", "config.json")
    )
    assert len(facts["weights"]) == 21
    said = ok("plan", tiny, "rtn_w4")
    for word in ("2 decoder blocks", "ragged: 2", "memory:", "disk:", "reader:   transformers: yes"):
        assert word in said


def test_show_tells_lineage_errors_and_notes(artifact: Path) -> None:
    said = ok("show", artifact)
    for word in (
        "source:",
        "step 1:   quantize.rtn(scheme=w4a16g32)",
        "step 2:   pack()",
        "compressed-tensors",
        "codes(w4a16g32)",
        "untouched",
    ):
        assert word in said
    assert "model.layers.1.mlp.up_proj.weight" in ok("show", artifact, "--layers")
    assert json.loads(ok("show", artifact, "--json"))["format"] == "compressed-tensors"


def test_list_shows_passes_options_and_formats() -> None:
    said = ok("list")
    for word in ("quantize.rtn:", "scheme (SCHEME, required)", "none|mse", "compressed-tensors"):
        assert word in said


def test_recipes(tmp_path: Path) -> None:
    listed = ok("recipes", "ls").partition("\n\n")[0].splitlines()
    names = [line.split()[0] for line in listed if not line.startswith(" ")]
    assert "rtn_w4" in names
    after = listed[listed.index(next(line for line in listed if line.startswith("five_stages"))) + 1]
    assert after.split() == ["--set", "calibrate.data=TEXTS.jsonl", "--set", "distill.logits.data=TEXTS.jsonl"]
    for name in names:
        assert "well-formed" in ok("recipes", "validate", name)
        assert "compress run" in ok("recipes", "show", name).splitlines()[0]
    ok("recipes", "cp", "rtn_w4", "mine.yaml", cwd=tmp_path)
    assert compress("recipes", "cp", "rtn_w4", "mine.yaml", cwd=tmp_path).returncode == 2
    assert "well-formed" in ok("recipes", "validate", "mine.yaml", cwd=tmp_path)
    assert json.loads(ok("recipes", "schema"))["title"] == "compress recipe"


def test_what_a_recipe_leaves_open_is_told_at_once_with_the_command(tiny: Path, tmp_path: Path) -> None:
    """Before torch is imported, all of it."""
    words = ["run", tiny, tmp_path / "out", "five_stages"]
    code = f"""
import sys
from compress.cli.app import build
sys.argv = ["compress", *{[*map(str, words)]!r}]
try:
    build(sys.argv[1:])()
finally:
    assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "none for calibrate.data (<TEXTS>.jsonl), distill.logits.data (<TEXTS>.jsonl)" in done.stderr
    settings = "--set calibrate.data=TEXTS.jsonl --set distill.logits.data=TEXTS.jsonl"
    assert f"compress run {tiny} {tmp_path / 'out'} five_stages {settings}" in done.stderr.splitlines()
    given = compress(*map(str, words), *settings.split())
    assert given.returncode == 3
    assert given.stderr.count("no such file") == 2
    shown = compress("recipes", "show", "five_stages")
    assert "note: placeholders, to be given by --set: calibrate.data (<TEXTS>.jsonl), distill" in shown.stderr
    assert "placeholders, to be given by: --set calibrate.data" in ok("recipes", "validate", "five_stages")


def test_clean(tiny: Path, tmp_path: Path) -> None:
    ok("run", tiny, tmp_path / "out", "-p", "quantize.rtn(scheme=w8a16) | pack")
    assert "removed" in ok("clean", tmp_path / "out")
    assert "nothing to clean" in ok("clean", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_version() -> None:
    from compress import __version__

    assert ok("--version").strip() == __version__


WRONG = {
    "unknown verb": (["rum"], 2, "No such command"),
    "unknown option": (["run", "a", "b", "--sed", "1"], 2, "No such option"),
    "no recipe": (["run", "{tiny}", "{out}"], 2, "neither"),
    "file and one-liner": (["run", "{tiny}", "{out}", "rtn_w4", "-p", "pack"], 2, "both"),
    "unknown recipe": (["run", "{tiny}", "{out}", "rtn_mixd"], 2, "did you mean 'rtn_mixed'"),
    "unknown pass": (["run", "{tiny}", "{out}", "-p", "quantise.rtn"], 2, "did you mean 'quantize.rtn'"),
    "unknown option of a pass": (["run", "{tiny}", "{out}", "-p", "quantize.rtn(sheme=w4a16)"], 2, "did you mean 'scheme'"),
    "bad scheme": (["quantize", "rtn", "{tiny}", "{out}", "--scheme", "w7a16"], 2, "2, 3, 4, 5, 6, 8"),
    "no scheme": (["quantize", "rtn", "{tiny}", "{out}"], 2, "scheme"),
    "bad choice": (["quantize", "rtn", "{tiny}", "{out}", "--scheme", "w4a16", "--clip", "mae"], 2, "'none' or 'mse'"),
    "bad set": (["run", "{tiny}", "{out}", "rtn_w4", "--set", "nonsense"], 2, "--set pass.option=value"),
    "bad shard size": (["run", "{tiny}", "{out}", "rtn_w4", "--shard-size", "big"], 2, "500MB"),
    "negative seed": (["run", "{tiny}", "{out}", "rtn_w4", "--seed", "-1"], 2, "--seed"),
    "target that matches nothing": (["quantize", "rtn", "{tiny}", "{out}", "--scheme", "w8a16", "--targets", "lineer"], 2, "did you mean 'linear'"),
    "no such directory": (["run", "./nowhere", "{out}", "rtn_w4"], 3, "no such directory"),
    "not a checkpoint": (["run", "{tmp}", "{out}", "rtn_w4"], 3, "safetensors"),
    "output exists": (["run", "{tiny}", "{tmp}", "rtn_w4", "--set", "1.scheme=w8a16"], 3, "choose another OUT"),
    "show of a foreign directory": (["show", "{tiny}"], 3, "manifest.json"),
    "a group that does not divide": (["quantize", "rtn", "{tiny}", "{out}", "--scheme", "w4a16g128"], 4, "ragged=divide"),
    "a reader that cannot": (["run", "{tiny}", "{out}", "-p", "quantize.rtn(scheme=w8a16g32-asym) | pack"], 5, "dequantize=true"),
    "no place to write": (["run", "{tiny}", "/proc/out", "rtn_w4", "--set", "1.scheme=w8a16"], 6, "a place to write"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_and_has_a_status(case: str, tiny: Path, tmp_path: Path) -> None:
    arguments, status, said = WRONG[case]
    filled = [a.format(tiny=tiny, out=tmp_path / "out", tmp=tmp_path) for a in arguments]
    done = compress(*filled)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.steps").exists()


def test_errors_are_json_under_json(tiny: Path, tmp_path: Path) -> None:
    done = compress("run", str(tiny), str(tmp_path / "out"), "-p", "quantize.rtn(scheme=w4a16g128)", "--json")
    last = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, last["event"], last["kind"]) == (4, "error", "CoverageError")


def test_a_folder_named_kernels_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "compress", "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "kernels shadows a package" in done.stderr


@pytest.mark.parametrize(
    ("text", "nbytes"), [("500MB", 500_000_000), ("5GB", 5_000_000_000), ("1GiB", 1 << 30), ("2048", 2048), ("1.5kB", 1500)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5XB", "nan"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@pytest.mark.parametrize(("words", "status"), [(["--version"], 0), (["nonsense"], 2)])
def test_a_process_ends_with_its_status_and_after_what_it_has_still_to_do(words: list[str], status: int) -> None:
    """It ends without Python's own end, so what was registered for that is done before."""
    code = f"import atexit, sys; sys.argv = ['compress', *{words!r}]; atexit.register(print, 'at last'); import compress.__main__ as m; m.run()"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (status, "at last"), done.stderr
    assert ("nonsense" in done.stderr) == bool(status)
