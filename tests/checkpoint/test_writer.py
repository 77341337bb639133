"""Writer: nothing is published before it is on disk, and neither is the name that it gets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from compress.checkpoint.safetensors_header import arrange
from compress.checkpoint.writer import Writer
from compress.errors import MachineError
from compress.spec.weight_state import TensorSpec


def written(folder: Path, specs: list[TensorSpec], shard_bytes: int) -> Writer:
    """A writer that has written and journaled ones, [8] each, and holds no file open."""
    writer = Writer(folder, arrange(specs, shard_bytes))
    writer.open("step")
    writer.attach()
    for spec in specs:
        writer.record(spec.name, {spec.name: writer.put(spec.name, torch.ones(8))}, {})
    writer.detach()
    return writer


def test_every_file_is_synced_before_the_rename_and_the_rename_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), sync(descriptor))[1])

    def renamed(source: Path, target: Path) -> None:
        assert {entry.stat().st_ino for entry in (source, *source.iterdir())} <= set(synced)
        synced.clear()
        rename(source, target)

    monkeypatch.setattr(os, "rename", renamed)
    specs = [TensorSpec(name, "F32", (8,)) for name in "abc"]
    side = tmp_path / "tokenizer.json"
    side.write_text("{}")
    writer = written(tmp_path / "out.tmp", specs, 40)
    writer.seal({"config.json": "{}"}, {"tokenizer.json": side})
    writer.publish(tmp_path / "out")
    assert tmp_path.stat().st_ino in synced
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == [
        "config.json", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip


def test_what_another_host_has_written_back_over_is_found(tmp_path: Path) -> None:
    """The last bytes of one tensor lie in the page of the next one, which another host has read too early and writes back."""
    specs = [TensorSpec(name, "F32", (8,)) for name in "abc"]
    writer = written(tmp_path / "out.tmp", specs, 1000)
    writer.check(writer.read_journals())
    with open(tmp_path / "out.tmp" / "model.safetensors", "r+b") as stream:
        stream.seek({spec.name: at for spec, at in writer.shards[0].places}["b"] + 30)
        stream.write(b"\0\0")
    with pytest.raises(MachineError, match=r"(?s)'b'.*others, in 1 of 3 tensors") as raised:
        writer.check(writer.read_journals())
    assert "run again" in str(raised.value)
    # What goes on finds the one that is to be written anew.
    again = Writer(tmp_path / "out.tmp", arrange(specs, 1000))
    again.open("step")
    again.attach()
    assert [again.is_done(name) for name in "abc"] == [True, False, True]
    again.detach()
