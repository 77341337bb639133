"""Record: what a reader has verified, bound to the bytes, and carried nowhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compress.checkpoint.reader import VERIFIED, open_checkpoint
from compress.context import Context
from compress.errors import MachineError
from compress.evaluate.record import record, verified_by
from compress.evaluate.verify import Reading, verify_bytes
from support import run


def reading(reader: str, difference: float = 0.0) -> Reading:
    return Reading(reader, "bfloat16", {reader: "1"}, (), 256, difference, 1.0, 0.0, 1.0, 0.02)


@pytest.fixture(scope="module")
def sound(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny, tmp_path_factory.mktemp("record") / "out", "quantize.rtn(scheme=w4a16g32) | pack").out


@pytest.fixture
def artifact(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "w4")


def test_readers_add_up_and_ours_does_not_count(artifact: Path) -> None:
    assert verified_by(artifact) == {}
    assert record(artifact, [reading("ours")]) is None
    assert record(artifact, [reading("transformers", difference=1.0)]) is None
    for name in ("transformers", "native"):
        assert record(artifact, [reading(name)]) == artifact / VERIFIED
    found = verified_by(artifact)
    assert found.keys() == {"transformers", "native"}
    assert found["native"]["versions"] == {"native": "1"}
    assert [path.name for path in artifact.iterdir() if path.name.startswith(".")] == []


def test_a_record_of_other_bytes_is_none(artifact: Path, tiny: Path, tmp_path: Path) -> None:
    record(artifact, [reading("transformers")])
    other = run(tiny, tmp_path / "other", "quantize.rtn(scheme=w8a16g32) | pack").out
    shutil.copy(artifact / VERIFIED, other / VERIFIED)
    assert verified_by(other) == {}
    for text in ("[]", "{", '{"fingerprint": 1}', json.dumps({"readers": {"transformers": {}}})):
        (artifact / VERIFIED).write_text(text)
        assert verified_by(artifact) == {}


def test_the_artifact_is_the_same_with_it_and_nothing_takes_it_along(artifact: Path, tmp_path: Path) -> None:
    record(artifact, [reading("transformers")])
    assert verify_bytes(open_checkpoint(artifact), Context(threads=1)).named
    made = run(artifact, tmp_path / "codes", "unpack").out
    assert not (made / VERIFIED).exists()
    assert VERIFIED not in open_checkpoint(artifact).side_files


def test_no_place_to_write(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(MachineError, match="No space left"):
        record(artifact, [reading("transformers")])
