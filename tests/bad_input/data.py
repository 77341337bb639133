"""Texts to calibrate on that are damaged, too few, or no texts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

from bad_input.bench import Case

LINES = "".join(json.dumps({"text": f"line {i} of a text"}) + "\n" for i in range(200))


def file(name: str, content: str | bytes) -> Callable[[Path], object]:
    """A file of texts beside the model."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda model: (model.parent / name).write_bytes(data)


def _case(content: str | bytes, *said: str, name: str = "data.jsonl", more: str = "", status: int = 3) -> Case:
    argv = f"calibrate {{model}} {{out}} --data {{work}}/{name} --samples 4 --length 32 {more}"
    return Case(status, said, argv, file(name, content), "demo")


def _domain(content: str, *said: str, more: str = "") -> Case:
    """A training pass over two domains, of which the second is odd."""

    def both(model: Path) -> None:
        (model.parent / "full.jsonl").write_text(LINES)
        (model.parent / "odd.jsonl").write_text(content)

    argv = (
        "distill logits {model} {out} --data {work}/full.jsonl --data {work}/odd.jsonl --loading dynamic --samples 8 --length 32"
    )
    return Case(3, said, f"{argv} --held-out 64 {more}", both, "demo")


CASES = {
    "empty": _case("", "data.jsonl", "at least one document", "none"),
    "blank lines": _case("\n\n \n", "at least one document", "none"),
    "an empty text file": _case("", "at least one document", name="data.txt"),
    "binary": _case(bytes(range(128, 256)) * 100, "data.jsonl:1", "a text in UTF-8", "the byte 0x80 at 1", "convert the file"),
    "a binary text file": _case(b"\x00\xff" * 5000, "data.txt: after byte 0", "a text in UTF-8", name="data.txt"),
    "one huge line of no JSON": _case("x" * 3_000_000, "data.jsonl:1", "a JSON object in one line", "repair the line or take it out"),
    "one huge record of no text": _case('{"text": [' + "1," * 1_000_000 + "1]}", "data.jsonl:1", "'text': a text", "a list"),
    "a deep record": _case('{"text":' * 100_000, "a JSON object in one line"),
    "wrong field": _case(LINES.replace("text", "body"), "a field 'text'", "only body", "set field"),
    "a field that is no text": _case('{"text": 3}\n', "'text': a text", "a number", "set field to a text"),
    "a conversation for a text": _case('{"text": [{"role": "user", "content": "hi"}]}\n', "'text': a text", "a list", "chat=true"),
    "too few tokens": _case('{"text": "short"}\n', "128 tokens for 4 samples of 32", "in 1 documents", "give more texts"),
    "not JSON in line 3": _case('{"text": "a"}\n{"text": "b"}\n{"text": \n' * 2, "a JSON object in one line", "data.jsonl:"),
    "a list in a line": _case('{"text": "a"}\n[1]\n', "data.jsonl:2", "a JSON object", "a list"),
    "an array": _case('[{"text": "a"}]', "data.jsonl:1", "one JSON object a line", "an array", "jq -c"),
    "half a character": _case('{"text": "\\ud800 and more"}\n', "a text of whole characters", "half of a surrogate pair"),
    "missing": _case(LINES, "nowhere.jsonl", "a file", "no such file", name="data.jsonl", more="--data {work}/nowhere.jsonl"),
    "directory": Case(3, ("folder.jsonl", "a file", "a directory"), "calibrate {model} {out} --length 32 --data {work}/folder.jsonl", lambda m: (m.parent / "folder.jsonl").mkdir(), "demo"),
    "truncated gz": _case(gzip.compress(LINES.encode())[:-30], "data.jsonl.gz", "a gzip file", "fetch or pack it again", name="data.jsonl.gz"),
    "a gz that is none": _case(LINES, "data.jsonl.gz", "a gzip file", "Not a gzipped file", name="data.jsonl.gz"),
    "a gz with wrong bytes": _case(gzip.compress(LINES.encode())[:60] + b"\0" * 90, "a gzip file", name="data.jsonl.gz"),
    "unknown ending": _case("a,b\n", "data.csv'", "a .jsonl, .json, .txt", "which ends in .csv", name="data.csv", status=2),
    "no ending": _case(LINES, "which has no ending", name="data", status=2),
    "a URL": Case(2, ("a URL", "download the file"), "calibrate {model} {out} --data https://user:hf_secret@host/data.jsonl", base="demo", unsaid="hf_secret"),
    "the same file twice": _case(LINES, "each source once", "twice", more="--data {work}/data.jsonl", status=2),
    "a parquet that is none": _case("PAR1", "data.parquet", "a sound parquet file", name="data.parquet"),
    "ready inputs that are none": _case(b"\0" * 100, "data.safetensors", "a header that is a JSON object", name="data.safetensors"),
    "a domain without a line": _domain("", "odd.jsonl", "at least one document", "none", "leave it out"),
    "a domain of blank texts": _domain('{"text": " "}\n' * 20, "odd.jsonl", "64 tokens for 2 samples of 32 in the half", "0 tokens"),
    "a domain of one document": _domain('{"text": "one"}\n', "odd.jsonl", "at least two documents, one of them to hold out"),
    "a domain with too little to hold out": _domain('{"text": "a few words"}\n' * 9, "odd.jsonl", "lower held_out, now 64 tokens"),
    "a family that is not there": _domain(LINES.replace("line", "row"), "nowhere.json", "No such file", more="--reference-family nowhere.json"),
    "options of data that is not named": Case(2, ("chat, split: only with data",), "calibrate {model} {out} --chat --split test", base="demo"),
}  # fmt: skip
