"""Pipeline: skips what is done, goes on after a kill, locks, checks the disk, publishes by one rename."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compress.checkpoint.manifest import Manifest, hash_json
from compress.checkpoint.reader import open_checkpoint
from compress.checkpoint.writer import Writer
from compress.context import Context
from compress.errors import CompressError, CoverageError, FormatError, InputError, MachineError, RecipeError, UsageError
from compress.pipeline.output_paths import clean, locked, steps_folder
from forked import python
from support import ready_inputs, run, step_of, tiny_llama, tree

RECIPE = "quantize.rtn(scheme=w4a16g32) | pack"


def test_the_same_run_again_is_up_to_date(tiny: Path, tmp_path: Path) -> None:
    first = run(tiny, tmp_path / "out", RECIPE)
    before = tree(tmp_path / "out")
    again = run(tiny, tmp_path / "out", RECIPE)
    assert first.fresh
    assert not again.fresh
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("recipe", ["quantize.rtn(scheme=w3a16g32) | pack", "quantize.rtn(scheme=w4a16g32)"])
def test_another_recipe_on_the_same_output_is_refused(tiny: Path, tmp_path: Path, recipe: str) -> None:
    run(tiny, tmp_path / "out", RECIPE)
    with pytest.raises(InputError, match="another result"):
        run(tiny, tmp_path / "out", recipe)


def test_a_directory_of_others_is_never_replaced(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    with pytest.raises(InputError, match="did not make"):
        run(tiny, tmp_path / "out", RECIPE)
    assert (tmp_path / "out" / "diary.txt").read_text() == "mine"


def test_same_seed_same_bytes_anywhere(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "a", RECIPE)
    run(shutil.copytree(tiny, tmp_path / "elsewhere" / tiny.name), tmp_path / "b", RECIPE)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_steps_are_kept_read_only_reused_and_cleaned(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out", RECIPE)
    step = step_of(tmp_path / "out", "quantize.rtn")
    assert not os.stat(step / "canonical.safetensors").st_mode & 0o222
    assert not os.path.samestat(os.stat(step / "canonical.safetensors"), os.stat(tmp_path / "out" / "model.safetensors"))
    shutil.rmtree(tmp_path / "out")
    inode = os.stat(step / "canonical.safetensors").st_ino
    run(tiny, tmp_path / "out", RECIPE)
    assert os.stat(step / "canonical.safetensors").st_ino == inode, "the step was made again"
    assert clean(tmp_path / "out", Context()) > 0
    assert not steps_folder(tmp_path / "out").exists()
    assert not run(tiny, tmp_path / "out", RECIPE).fresh
    assert clean(tmp_path / "out", Context()) == 0


def test_one_pass_at_a_time_equals_the_recipe(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "codes", "quantize.rtn(scheme=w4a16g32)")
    run(tmp_path / "codes", tmp_path / "packed", "pack")
    run(tiny, tmp_path / "out", RECIPE)
    one, two = Manifest.read(tmp_path / "packed"), Manifest.read(tmp_path / "out")
    assert one is not None
    assert two is not None
    assert one.digests == two.digests
    assert [step.id for step in one.lineage] == [step.id for step in two.lineage]


def test_lineage_tells_the_way_from_the_source(tiny: Path, tmp_path: Path) -> None:
    manifest = run(tiny, tmp_path / "out", RECIPE).manifest
    assert [step.text for step in manifest.lineage] == ["quantize.rtn(scheme=w4a16g32)", "pack()"]
    assert manifest.lineage[0].parent == manifest.source.fingerprint
    assert manifest.lineage[1].parent == manifest.parent
    assert manifest.fingerprint == manifest.compute_fingerprint()
    assert all(0 < record.error < 0.2 for record in manifest.weights.values() if record.error)
    assert sum(note.count for note in manifest.notes if note.what == "untouched") == 21 - 14


def test_a_second_run_waits_for_nobody(tiny: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "out", Context()), pytest.raises(MachineError, match="holds its lock"):
        run(tiny, tmp_path / "out", RECIPE)
    assert not steps_folder(tmp_path / "out").exists() or run(tiny, tmp_path / "out", RECIPE).fresh


def test_too_little_disk_is_said_before_starting(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(MachineError, match="bytes free"):
        run(tiny, tmp_path / "out", RECIPE)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_loses_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = run(tiny, tmp_path / "ref", RECIPE)
    put = Writer.put
    monkeypatch.setattr(Writer, "put", lambda self, name, tensor: _full() if "down_proj" in name else put(self, name, tensor))
    with pytest.raises(MachineError, match="free some space"):
        run(tiny, tmp_path / "out", RECIPE)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert run(tiny, tmp_path / "out", RECIPE).manifest.digests == reference.manifest.digests


def _full() -> str:
    raise MachineError("disk", "a place to write", "No space left on device", "free some space and run again")


RUN = """
import os, signal, sys, threading, time
from pathlib import Path
import compress.executors.stream as s
tests, source, out, recipe, delay = sys.argv[1:]
sys.path.insert(0, tests)
from support import run
move, moved = s._move, []
def killed():
    time.sleep(float(delay))
    os.kill(os.getpid(), signal.SIGKILL)
def slow(*args):
    if not moved:
        threading.Thread(target=killed).start()
    moved.append(time.sleep(0.02))
    return move(*args)
s._move = slow
run(Path(source), Path(out), recipe)
"""
"""Runs a recipe, killed some seconds after the first weight is on its way."""


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.12, 0.2, 0.3, 0.42])
def test_killed_and_run_again_gives_the_same_bytes(tiny: Path, tmp_path: Path, delay: float) -> None:
    run(tiny, tmp_path / "ref", RECIPE)
    out = tmp_path / "out"
    done = python(RUN, Path(__file__).parents[1], tiny, out, RECIPE, delay)
    # Forty weights of 0.02 s on two threads.
    assert done.returncode in ((-signal.SIGKILL,) if delay < 0.3 else (-signal.SIGKILL, 0)), done.stderr
    run(tiny, out, RECIPE)
    assert tree(out) == tree(tmp_path / "ref")
    assert not list(steps_folder(out).glob("*.tmp"))


def test_going_on_with_other_shards_starts_that_step_over(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import compress.executors.stream as stream

    reference = run(tiny, tmp_path / "ref", RECIPE)
    move, left = stream._move, [9]

    def stopping(*args: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return move(*args)

    monkeypatch.setattr(stream, "_move", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "out", RECIPE)
    monkeypatch.undo()
    assert run(tiny, tmp_path / "out", RECIPE, shard_bytes=20_000).manifest.digests == reference.manifest.digests


def test_a_damaged_output_is_not_up_to_date(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out", RECIPE)
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated"):
        run(tiny, tmp_path / "out", RECIPE)


def flip(file: Path, at: int) -> None:
    mode = file.stat().st_mode
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[at] ^= 0xFF
    file.write_bytes(data)
    file.chmod(mode)


def test_a_damaged_step_is_made_again(tiny: Path, tmp_path: Path) -> None:
    reference = run(tiny, tmp_path / "out", RECIPE)
    before = tree(tmp_path / "out")
    flip(step_of(tmp_path / "out", "quantize.rtn") / "canonical.safetensors", -9)
    shutil.rmtree(tmp_path / "out")
    assert run(tiny, tmp_path / "out", RECIPE).manifest.digests == reference.manifest.digests
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "generation_config.json"])
def test_an_output_with_other_bytes_is_not_up_to_date(file: str, tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out", RECIPE)
    if file == "generation_config.json":
        (tmp_path / "out" / file).unlink()
    else:
        flip(tmp_path / "out" / file, -9 if file.startswith("model") else 3)
    with pytest.raises(InputError):
        run(tiny, tmp_path / "out", RECIPE)


def test_a_crash_while_side_files_are_copied_is_resumed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = run(tiny, tmp_path / "ref", RECIPE)

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.checkpoint.writer.shutil.copyfile", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "out", RECIPE)
    half = next(steps_folder(tmp_path / "out").glob("*.tmp"))
    assert all(os.stat(file).st_mode & 0o200 for file in half.iterdir()), "what is not published must stay writable"
    monkeypatch.undo()
    assert run(tiny, tmp_path / "out", RECIPE).manifest.digests == reference.manifest.digests


def test_side_files_of_any_name_are_carried(tiny: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny, tmp_path / "source")
    for name in ("step", "journal.txt", "journal.0", "lock"):
        (source / name).write_text(name)
    (source / "manifest.json").write_text('{"name": "a web app"}')
    result = run(source, tmp_path / "out", RECIPE)
    for name in ("step", "journal.txt", "journal.0", "lock"):
        assert (tmp_path / "out" / name).read_text() == name
    assert [note.names for note in result.manifest.notes if note.what == "left behind"] == [("manifest.json",)]


def test_places_that_no_run_may_take(tiny: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny, tmp_path / "source")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").write_text("mine")
    for out, said in (
        (source / "out", "inside"),
        (tmp_path / "link", "a link"),
        (tmp_path / "file", "a file"),
        (source, "did not make"),
    ):
        with pytest.raises(InputError, match=said):
            run(source, out, RECIPE)
    assert (tmp_path / "file").read_text() == "mine"
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "o.steps").mkdir()
    (tmp_path / "o.steps" / "lock").symlink_to(victim)
    with pytest.raises(MachineError):
        run(source, tmp_path / "o", RECIPE)
    assert victim.read_text() == "precious"


def test_what_is_journaled_is_not_done_again_and_torn_tensors_are(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import compress.executors.stream as stream

    reference = run(tiny, tmp_path / "ref", RECIPE)
    move, seen = stream._move, []

    def stopping(*args: object) -> object:
        if len(seen) == 9:
            raise KeyboardInterrupt
        seen.append(args[1])
        return move(*args)

    monkeypatch.setattr(stream, "_move", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "out", RECIPE)
    half = next(steps_folder(tmp_path / "out").glob("*.tmp"))
    journal = [json.loads(line) for line in (half / ".compress-journal.0").read_bytes().splitlines()]
    assert 0 < len(journal) <= 9
    torn = next(entry["weight"] for entry in journal)
    data = bytearray((half / "canonical.safetensors").read_bytes())
    name = next(iter(next(e for e in journal if e["weight"] == torn)["digests"]))
    from compress.checkpoint.safetensors_header import read_header

    ref = next(r for r in read_header(lambda o, n: bytes(data[o : o + n]), len(data), "f")[0] if r.name == name)
    data[ref.offset] ^= 0xFF
    (half / "canonical.safetensors").write_bytes(data)
    with open(half / ".compress-journal.0", "ab") as stream_:
        stream_.write(b'{"weight": "cut o')
    again: list[str] = []
    monkeypatch.setattr(stream, "_move", lambda *args: (again.append(args[1].name), move(*args))[1])
    result = run(tiny, tmp_path / "out", RECIPE)
    assert torn in again
    first = again[: 21 - len(journal) + 1]
    assert not {entry["weight"] for entry in journal} - {torn} & set(first)
    assert result.manifest.digests == reference.manifest.digests


REFUSED = {
    "twice quantized": ("quantize.rtn(scheme=w4a16g32) | quantize.rtn(scheme=w8a16)", CoverageError, "already codes(w4a16g32)"),
    "a group that does not divide": ("quantize.rtn(scheme=w4a16g64)", CoverageError, "ragged=divide (groups of 48)"),
    "packing what is dense": ("pack", FormatError, "nothing is quantized"),
    "a pass after pack": (
        "quantize.rtn(scheme=w4a16g32) | pack | quantize.rtn(scheme=w4a16g32, targets=[head])",
        RecipeError,
        "last",
    ),
    "asymmetric for this reader": ("quantize.rtn(scheme=w8a16g32-asym) | pack", FormatError, "dequantize=true"),
    "packed embeddings": ("quantize.rtn(scheme=w4a16g32, targets=[embeddings]) | pack", FormatError, "embeddings"),
    "nothing targeted": ("quantize.rtn(scheme=w4a16g32, targets=[])", CoverageError, "no weight to work on"),
    "everything skipped": ("quantize.rtn(scheme=w4a16g32, skip=[linear])", CoverageError, "no weight to work on"),
    "a norm as a target": ("quantize.rtn(scheme=w4a16g32, targets=['re:.*norm'])", CoverageError, "norm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_any_work(case: str, tiny: Path, tmp_path: Path) -> None:
    recipe, kind, said = REFUSED[case]
    with pytest.raises(CompressError) as caught:
        run(tiny, tmp_path / "out", recipe)
    assert type(caught.value) is kind
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_facts_of_all_lines_are_told_at_once(tiny: Path, tmp_path: Path) -> None:
    recipe = "quantize.rtn(scheme=w4a16g128, targets=[attention]) | quantize.rtn(scheme=w4a16g80, targets=[mlp]) | pack"
    with pytest.raises(CoverageError) as caught:
        run(tiny, tmp_path / "out", recipe)
    said = str(caught.value)
    assert "-p:1:1" in said
    assert "-p:1:5" in said
    assert "nothing to pack" not in said


def test_named_skips_become_counted_lines(tiny: Path, tmp_path: Path) -> None:
    recipe = "quantize.rtn(scheme=w4a16g64) | pack"
    result = run(tiny, tmp_path / "out", recipe, allow_skips=["down_proj"])
    skipped = [note for note in result.manifest.notes if note.what == "skipped"]
    assert [(note.count, "do not divide 96 columns" in note.reason) for note in skipped] == [(2, True)]
    assert step_of(tmp_path / "out", "quantize.rtn")
    assert Manifest.read(step_of(tmp_path / "out", "quantize.rtn")).coverage == {"targeted": 14, "transformed": 12, "skipped": 2}  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="none that matches"):
        run(tiny, tmp_path / "never", "quantize.rtn(scheme=w4a16g32)", allow_skips=["down_proj"])
    divided = run(tiny, tmp_path / "divided", "quantize.rtn(scheme=w4a16g64, ragged=divide) | pack")
    assert [(n.what, n.count) for n in divided.manifest.notes if n.what == "ragged"] == [("ragged", 2)]


def test_untouched_towers_are_said(tiny: Path, tmp_path: Path) -> None:
    result = run(tiny, tmp_path / "out", "quantize.rtn(scheme=w4a16g32, targets=[attention]) | pack")
    reasons = {note.reason: note.count for note in result.manifest.notes if note.what == "untouched"}
    assert reasons["linear of decoder"] == 6
    assert reasons["embedding"] == 1


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m", num_hidden_layers=3)
    run(model, tmp_path / "one", RECIPE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    arguments = ["-m", "compress", "run", str(model), str(tmp_path / "two"), "-p", RECIPE]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = Manifest.read(tmp_path / "one"), Manifest.read(tmp_path / "two")
    assert one is not None
    assert two is not None
    assert two.measured["ranks"] == 2
    assert one.digests == two.digests
    assert open_checkpoint(tmp_path / "two").refs.keys() == one.digests.keys()


def test_tokens_that_a_kill_has_left_half_copied_are_not_told_of(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = f"calibrate(data='{ready_inputs()}', samples=6) | quantize.rtn(scheme=w4a16g32)"
    reference = run(tiny, tmp_path / "ref", recipe)
    copy = shutil.copyfile

    def torn(source: Path, target: Path) -> None:
        copy(source, target)
        if target.name == "calibration.safetensors":
            os.truncate(target, 100)
            raise KeyboardInterrupt

    monkeypatch.setattr("compress.checkpoint.writer.shutil.copyfile", torn)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "out", recipe)
    monkeypatch.undo()
    assert run(tiny, tmp_path / "out", recipe).manifest.fingerprint == reference.manifest.fingerprint
    assert not run(tiny, tmp_path / "out", recipe).fresh


def test_a_manifest_from_before_its_newest_fields_is_read(tiny: Path, tmp_path: Path) -> None:
    """What says nothing has no key, so that a fingerprint of 0.1.0 still holds."""
    run(tiny, tmp_path / "out", "quantize.rtn(scheme=w4a16g32) | pack")
    content = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert not {"device", "structure"} & content.keys()
    assert content["source"].keys() == {"name", "commit", "licence", "datasets", "fingerprint"}
    del content["fingerprint"], content["measured"]
    assert hash_json(content) == json.loads((tmp_path / "out" / "manifest.json").read_text())["fingerprint"]
