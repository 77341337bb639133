"""Solved steps of another run: found by id, linked among steps, copied into OUT, never trusted without their digests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.errors import UsageError
from compress.pipeline.output_paths import clean, steps_folder
from compress.pipeline.run import Options, OtherResultError, run_recipe
from compress.spec.recipe import parse_one_liner
from support import TEXT, tree

TWO = "prune.magnitude(sparsity=0.5) | quantize.rtn(scheme=w4a16g32)"


@pytest.fixture(scope="module")
def solved(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with its steps beside it; copy it before changing anything."""
    out = tmp_path_factory.mktemp("solved") / "first"
    run_recipe(parse_one_liner(f"{TWO} | pack"), open_checkpoint(tiny), out, Context(threads=1))
    return out


@pytest.fixture
def first(solved: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    shutil.copytree(solved, tmp_path / "first")
    shutil.copytree(steps_folder(solved), tmp_path / "first.steps")
    return tmp_path / "first"


def go(source: Path, out: Path, recipe: str, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A run's result, and its events but for progress."""
    events: list[dict[str, Any]] = []
    ctx = Context(threads=1, events=events.append)
    result = run_recipe(parse_one_liner(recipe), open_checkpoint(source), out, ctx, Options(**options))
    return result, [event for event in events if event["event"] != "progress"]


def shards(folder: Path) -> dict[str, Path]:
    return {f"{path.parent.name}/{path.name}": path for path in sorted(folder.glob("*/*.safetensors"))}


@pytest.mark.parametrize("beside", [False, True], ids=["OUT", "OUT.steps"])
def test_another_format_takes_the_solved_steps(tiny: Path, first: Path, tmp_path: Path, beside: bool) -> None:
    given = steps_folder(first) if beside else first
    result, events = go(tiny, tmp_path / "second", f"{TWO} | pack(format=gptq)", steps=[given])
    assert [(one.name, one.folder) for one in result.taken] == [
        ("prune.magnitude", steps_folder(first)), ("quantize.rtn", steps_folder(first))
    ]  # fmt: skip
    assert set(result.measured) == {"pack"}
    assert [event["step"] for event in events if event["event"] == "taken"] == ["prune.magnitude", "quantize.rtn"]
    # The same bytes as made from nothing.
    alone, _ = go(tiny, tmp_path / "alone", f"{TWO} | pack(format=gptq)")
    assert tree(tmp_path / "second") == tree(tmp_path / "alone")
    assert alone.manifest.fingerprint == result.manifest.fingerprint
    # Steps share what is read-only; OUT shares nothing.
    ours, theirs = shards(steps_folder(tmp_path / "second")), shards(steps_folder(first))
    assert ours.keys() == theirs.keys()
    for name, path in ours.items():
        assert path.samefile(theirs[name]) == (not theirs[name].stat().st_mode & 0o222)
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "second").iterdir())
    # What is cleaned there stays here.
    assert clean(first, Context()) < sum(path.stat().st_size for path in ours.values())
    assert not go(tiny, tmp_path / "second", f"{TWO} | pack(format=gptq)")[0].fresh


def test_a_step_becomes_an_output_by_copy(tiny: Path, first: Path, tmp_path: Path) -> None:
    result, _ = go(tiny, tmp_path / "codes", TWO, steps=[first])
    assert len(result.taken) == 2
    assert not result.measured
    shard = tmp_path / "codes" / "canonical.safetensors"
    assert (shard.stat().st_nlink, bool(shard.stat().st_mode & 0o200)) == (1, True)
    again, _ = go(tiny, tmp_path / "packed", f"{TWO} | pack", steps=[tmp_path / "codes"])
    assert [one.where for one in again.taken] == [
        steps_folder(tmp_path / "codes") / result.taken[0].where.name,
        tmp_path / "codes",
    ]
    assert tree(tmp_path / "packed") == tree(first)
    # Other shards are another layout, which is made anew.
    assert "quantize.rtn" in go(tiny, tmp_path / "shards", TWO, steps=[first], shard_bytes=40_000)[0].measured


def test_a_damaged_step_is_told_and_made_anew(tiny: Path, first: Path, tmp_path: Path) -> None:
    shard = next(path for name, path in shards(steps_folder(first)).items() if "quantize" in name)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    result, events = go(tiny, tmp_path / "second", f"{TWO} | pack(format=native)", steps=[first])
    assert [one.name for one in result.taken] == ["prune.magnitude"]
    assert set(result.measured) == {"quantize.rtn", "pack"}
    told = next(event for event in events if event["event"] == "damaged")
    assert told["where"] == str(shard.parent)
    assert "the bytes that manifest.json names" in told["reason"]
    assert not list(steps_folder(tmp_path / "second").glob("*.taken"))


def test_tokens_are_taken_and_what_they_are_for(demo_model: Path, tmp_path: Path) -> None:
    calibrated = f"calibrate(data='{TEXT / 'calibration.jsonl'}', samples=4, length=64) | prune.wanda(sparsity=0.5)"
    go(demo_model, tmp_path / "one", calibrated)
    result, _ = go(demo_model, tmp_path / "two", f"{calibrated} | quantize.rtn(scheme=w8a16)", steps=[tmp_path / "one"])
    assert [one.name for one in result.taken] == ["calibrate", "prune.wanda"]
    # Another seed draws others.
    ctx = Context(threads=1, seed=1)
    options = Options(steps=[tmp_path / "one"])
    other = run_recipe(parse_one_liner(calibrated), open_checkpoint(demo_model), tmp_path / "three", ctx, options)
    assert other.taken == ()


def test_an_output_that_is_something_else_says_what_it_has(tiny: Path, first: Path) -> None:
    with pytest.raises(OtherResultError, match=f"--steps {first} it takes 2 of 3 steps") as error:
        go(tiny, first, f"{TWO} | pack(format=gptq)")
    assert (error.value.solved, error.value.steps, error.value.format) == (2, 3, "gptq")
    with pytest.raises(OtherResultError, match="choose another OUT; or remove it"):
        go(tiny, first, "quantize.rtn(scheme=w8a16)")


def test_steps_that_are_not_to_be_kept(tiny: Path, first: Path, tmp_path: Path) -> None:
    result, _ = go(tiny, tmp_path / "out", f"{TWO} | pack", keep=False)
    assert result.fresh
    assert not steps_folder(tmp_path / "out").exists()
    assert not go(tiny, tmp_path / "out", f"{TWO} | pack", keep=False)[0].fresh
    # Those of the run that they were taken from are not this run's to remove.
    go(tiny, tmp_path / "second", f"{TWO} | pack(format=native)", steps=[first], keep=False)
    assert shards(steps_folder(first))
    assert not go(tiny, first, f"{TWO} | pack", keep=False)[0].fresh
    assert not steps_folder(first).exists()


def test_a_directory_that_is_not_there(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the OUT of another run"):
        go(tiny, tmp_path / "out", TWO, steps=[tmp_path / "nowhere"])
    assert not (tmp_path / "out").exists()


def test_links_are_not_needed(tiny: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    result, _ = go(tiny, tmp_path / "second", f"{TWO} | pack(format=native)", steps=[first])
    assert len(result.taken) == 2
    for path in shards(steps_folder(tmp_path / "second")).values():
        assert (path.stat().st_nlink, path.stat().st_mode & 0o222) == (1, 0)
    manifest = json.loads((tmp_path / "second" / "manifest.json").read_text())
    assert [line["text"] for line in manifest["lineage"]][-1] == "pack(format=native)"
