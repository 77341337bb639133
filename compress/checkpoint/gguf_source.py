"""GGUF source: a GGUF file of another tool, opened as a checkpoint.

Such a file stands alone: config.json and the tokenizer are rebuilt from its metadata, in a folder of the cache that is named
after the file's header and place. The tensors are read where they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from compress.checkpoint.cache import folder_of
from compress.checkpoint.gguf_config import config_of
from compress.checkpoint.gguf_header import read_gguf
from compress.checkpoint.gguf_tokenizer import tokenizer_texts
from compress.errors import InputError, MachineError

POINTER = ".gguf-file"
"""In such a folder: where the file lies."""
_LONGEST = 100
"""Characters of the file's name in that of the folder."""


def file_of(path: Path) -> Path | None:
    """The GGUF file that `path` names: itself, one that stands alone in a directory, or that of a folder in the cache."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.absolute().parent == folder_of("gguf") and (path / POINTER).is_file():
        return Path((path / POINTER).read_text(encoding="utf-8"))
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    names = sorted(entry.name for entry in path.iterdir() if entry.name.endswith((".gguf", ".safetensors", ".index.json")))
    return path / names[0] if len(names) == 1 and names[0].endswith(".gguf") else None


def folder_for(file: Path) -> Path:
    """The folder with the texts that a file means. Raises InputError for a file that is not sound, MachineError without room."""
    target = Path(os.path.realpath(file))
    try:
        with open(target, "rb") as stream:

            def read(offset: int, length: int) -> bytes:
                stream.seek(offset)
                return stream.read(length)

            size = os.fstat(stream.fileno()).st_size
            header = read_gguf(read, size, file.name)
            identity = hashlib.sha256(read(0, header.header_bytes) + f"{target} {size} {os.stat(target).st_mtime_ns}".encode())
            config = config_of(header, file.name, read)
            texts = {"config.json": json.dumps(config, indent=2) + "\n", **tokenizer_texts(header.metadata, file.name)}
    except OSError as error:
        raise InputError(str(file), "a readable file", error.strerror or str(error)) from None
    place = folder_of("gguf") / f"{file.stem[:_LONGEST]}-{identity.hexdigest()[:12]}"
    if not (place / POINTER).is_file():
        _write(place, {**texts, POINTER: str(target)})
    return place


def _write(place: Path, texts: dict[str, str]) -> None:
    """Makes a folder, whole or not at all."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=place.parent, prefix=".draft-"))
        for name, text in texts.items():
            (draft / name).write_text(text, encoding="utf-8")
        try:
            os.rename(draft, place)
        except OSError:
            # Another process was faster.
            shutil.rmtree(draft, ignore_errors=True)
            if not (place / POINTER).is_file():
                raise
    except OSError as error:
        do = "make room, or set COMPRESS_CACHE to a folder that can be written"
        raise MachineError(str(place.parent), "room for the texts of a GGUF file", error.strerror or str(error), do) from None
