"""calibrate without data: the text that ships, told where it is used, drawn the same everywhere; and what to run without tokens."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from pydantic import ValidationError

from compress.checkpoint.manifest import Manifest
from compress.contract.discover import load_pass
from compress.corpus import Corpus, shipped
from compress.pipeline.resolve import resolve
from compress.spec.recipe import parse_one_liner
from support import TEXT, step_of

DEMO = TEXT.parent / "model"
GPTQ = "quantize.gptq(scheme=w4a16g32)"


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


def command(*words: object) -> Done:
    """`compress` with these words, in this process."""
    from compress.__main__ import main

    out, err, status = io.StringIO(), io.StringIO(), 0
    typed = mock.patch.object(sys, "argv", ["compress", *map(str, words)])
    with typed, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Done(status, out.getvalue(), err.getvalue())


def test_the_text_that_ships_is_as_its_page_says() -> None:
    lines = [json.loads(line) for line in shipped.path().read_text(encoding="utf-8").splitlines()]
    assert all(set(line) == {"kind", "text"} and len(line["text"]) > 80 for line in lines)
    assert len({line["text"] for line in lines}) == len(lines)
    said = (shipped.path().parent / "README.md").read_text()
    nbytes = sum(len(line["text"].encode()) for line in lines)
    assert f"{len(lines)} documents, {nbytes // 1000} kB" in said
    kinds = {line["kind"] for line in lines}
    assert kinds >= {"encyclopedic", "dialogue", "instruction", "fiction", "maths", "code", "data", "german", "chinese", "arabic"}
    assert hashlib.sha256(shipped.path().read_bytes()).hexdigest() in shipped.told()


def test_without_data_it_is_used_and_told(tmp_path: Path) -> None:
    done = command("run", DEMO, tmp_path / "out", "-p", f"calibrate(samples=4, length=32) | {GPTQ} | pack")
    assert done.status == 0, done.err
    assert f"note: calibrate: default text: {shipped.told()}" in done.err
    assert f"default text: 1 ({shipped.told()})" in done.out
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    assert [(note.what, note.reason) for note in manifest.notes if note.what == "default text"] == [
        ("default text", shipped.told())
    ]
    assert shipped.told() in (tmp_path / "out" / "README.md").read_text()
    corpus = Corpus.load(step_of(tmp_path / "out", "calibrate") / "calibration.safetensors")
    assert [(source.name, source.sha256) for source in corpus.sources] == [
        ("mixed.jsonl", hashlib.sha256(shipped.path().read_bytes()).hexdigest())
    ]
    # A later run over it says it still, and says it once.
    again = command("run", tmp_path / "out", tmp_path / "again", "-p", "unpack | pack(format=native)")
    assert again.status == 0, again.err
    assert again.out.count("default text: 1") == 1


def test_its_numbers_are_written_down_and_read_back() -> None:
    (short,) = resolve(parse_one_liner("calibrate"))
    assert str(short.line()) == "calibrate(samples=64, length=512)"
    (more,) = resolve(parse_one_liner("calibrate(samples=128)"))
    assert str(more.line()) == "calibrate(samples=128, length=512)"
    for found in (short, more):
        assert resolve(parse_one_liner(str(found.line()))) == [found]
        assert type(found)(**found.model_dump()) == found
    (named,) = resolve(parse_one_liner("calibrate(data=a.jsonl)"))
    assert (str(named.line()), named.tokens_at_most()) == ("calibrate(data=[a.jsonl])", (128 * 2048, 2048))  # type: ignore[attr-defined]
    with pytest.raises(ValidationError, match="field: only with data"):
        load_pass("calibrate")(field="body")


@pytest.mark.parametrize(
    ("argv", "recipe"),
    [
        (("quantize", "gptq", "MODEL", "OUT", "--scheme", "w4a16g32"), f"calibrate | {GPTQ}"),
        (("run", "MODEL", "OUT", "-p", f"{GPTQ} | pack"), f"calibrate | {GPTQ} | pack"),
        (
            ("run", "MODEL", "OUT", "-p", f"prune.magnitude(sparsity=0.5) | {GPTQ}"),
            f"prune.magnitude(sparsity=0.5) | calibrate | {GPTQ}",
        ),
    ],
)
def test_without_tokens_the_recipe_to_run_is_printed(argv: tuple[str, ...], recipe: str, tmp_path: Path) -> None:
    done = command(*({"MODEL": DEMO, "OUT": tmp_path / "out"}.get(word, word) for word in argv))
    assert done.status == 2
    assert f"compress run MODEL OUT -p '{recipe}'" in done.err
    assert "calibrate(data=...) reads your text" in done.err
