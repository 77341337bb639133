"""Records: kept beside the manifest, bound to its fingerprint, and no part of the checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compress.checkpoint.reader import RECORDS, open_checkpoint
from compress.context import Context
from compress.errors import InputError
from compress.evaluate import records
from compress.evaluate.records import Number, QualityRecord, ReaderRecord, TaskRecord
from compress.evaluate.verify import verify_bytes
from support import run, tiny_llama

RTN = "quantize.rtn(scheme=w4a16g32)"
PASSED = ReaderRecord(passed=True, version="5.0")


def quality(step: str, perplexity: float) -> QualityRecord:
    return QualityRecord(
        step=step, data="text.jsonl", data_sha256="d", tokens=512, length=256, scored=510, protocol="all",
        perplexity=Number(value=perplexity),
    )  # fmt: skip


def test_a_record_holds_for_the_bytes_it_was_made_of(tmp_path: Path) -> None:
    assert records.verification(tmp_path, "one") is None
    place = records.keep_reader(tmp_path, "one", "vllm", PASSED)
    records.keep_reader(tmp_path, "one", "transformers", ReaderRecord(passed=False, reason="other logits"))
    found = records.verification(tmp_path, "one")
    assert found is not None
    assert ([*found.readers], [*found.passed]) == (["transformers", "vllm"], ["vllm"])
    assert records.verification(tmp_path, "two") is None, "of other bytes"
    records.keep_reader(tmp_path, "two", "gptqmodel", PASSED)
    assert [*json.loads(place.read_text())["readers"]] == ["gptqmodel"], "what held for other bytes is gone"
    assert [path.name for path in tmp_path.iterdir()] == ["verification.json"]


def test_a_later_measurement_replaces_the_same_one(tmp_path: Path) -> None:
    records.keep_quality(tmp_path, "one", [quality("a", 9.0), quality("b", 8.0)])
    records.keep_tasks(tmp_path, "one", [TaskRecord(task="hellaswag", metric="acc", value=0.5)])
    records.keep_quality(tmp_path, "one", [quality("b", 7.0)])
    found = records.evaluation(tmp_path, "one")
    assert found is not None
    assert [(one.step, one.perplexity.value) for one in found.quality] == [("a", 9.0), ("b", 7.0)]
    assert [task.task for task in found.tasks] == ["hellaswag"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema_version": 1, "fingerprint": "one", "quality": [{"step": 1}]}', '{"NaN": NaN}']
)
def test_a_file_that_is_no_record(text: str, tmp_path: Path) -> None:
    for name, read in zip(RECORDS, (records.evaluation, records.verification)):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="a record that this version can read"):
            read(tmp_path, "one")
    records.keep_reader(tmp_path, "one", "vllm", PASSED)
    assert records.verification(tmp_path, "one") is not None


def test_records_are_no_part_of_the_checkpoint(tiny: Path, tmp_path: Path) -> None:
    result = run(tiny, tmp_path / "out", RTN)
    before = open_checkpoint(tmp_path / "out")
    records.keep_reader(tmp_path / "out", result.manifest.fingerprint, "transformers", PASSED)
    records.keep_quality(tmp_path / "out", result.manifest.fingerprint, [quality(result.manifest.lineage[-1].id, 9.0)])
    after = open_checkpoint(tmp_path / "out")
    assert (after.side_files, after.left_behind) == (before.side_files, before.left_behind)
    assert verify_bytes(after, Context()).named
    assert not run(tiny, tmp_path / "out", RTN).fresh
    # They do not go on to what is made from it.
    run(tmp_path / "out", tmp_path / "packed", "pack")
    assert not {*RECORDS} & {path.name for path in (tmp_path / "packed").iterdir()}


def test_files_of_these_names_in_another_tools_model_are_counted(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    (model / "evaluation.json").write_text("{}")
    result = run(model, tmp_path / "out", RTN)
    (note,) = (note for note in result.manifest.notes if note.what == "left behind")
    assert note.names == ("evaluation.json",)
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_who_has_verified_the_bytes_that_lie_there(tmp_path: Path, tiny: Path) -> None:
    """Nobody, where the record is missing, damaged or one of other bytes; nor a reader that failed."""
    result = run(tiny, tmp_path / "out", "quantize.rtn(scheme=w4a16g32) | pack")
    assert records.verified_by(result.out) == ()
    for reader, passed in (("transformers", True), ("native", True), ("peft", False)):
        records.keep_reader(result.out, result.manifest.fingerprint, reader, records.ReaderRecord(passed=passed))
    assert records.verified_by(result.out) == ("native", "transformers")
    other = run(tiny, tmp_path / "other", "quantize.rtn(scheme=w8a16g32) | pack").out
    shutil.copy(result.out / records.VERIFICATION, other)
    assert records.verified_by(other) == ()
    for text in ("[]", "{", '{"fingerprint": 1}'):
        (result.out / records.VERIFICATION).write_text(text)
        assert records.verified_by(result.out) == ()
