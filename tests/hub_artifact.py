"""An artifact for tests of pushing: its source's card, its record of a reader, and whether a repository holds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compress.checkpoint.manifest import Manifest
from compress.evaluate.records import ReaderRecord, keep_reader
from hub_server import Hub
from support import tiny_llama

REPO = "someone/tiny-w4"
TOKEN = "hf_secret123"
RECIPE = "quantize.rtn(scheme=w4a16g32) | pack"
Said = tuple[int, str, str]
Typed = Callable[..., Said]


def licensed(source: Path, metadata: str = "license: apache-2.0") -> Path:
    """A tiny Llama with a card."""
    tiny_llama(source)
    (source / "README.md").write_text(f"---\n{metadata}\n---\n# Tiny\n")
    return source


def verified(out: Path) -> None:
    """Writes the record of a reading, as `compress verify` does."""
    manifest = Manifest.read(out)
    assert manifest is not None
    keep_reader(out, manifest.fingerprint, "transformers", ReaderRecord(passed=True, version="5"))


def same(hub: Hub, artifact: Path, repo: str = REPO, revision: str = "main") -> None:
    """The repository has the artifact's files and a card, and no others; all but the card byte for byte."""
    there = hub.files(repo, revision)
    here = {path.relative_to(artifact).as_posix(): path for path in artifact.rglob("*") if path.is_file()}
    card = {"README.md", "bits.svg"}
    assert there.keys() - {".gitattributes"} - card == here.keys() - card
    assert "README.md" in there
    for name in here.keys() - card:
        assert there[name].read_bytes() == here[name].read_bytes(), name
