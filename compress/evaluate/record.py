"""Record: which readers have verified an artifact, in a file beside its shards.

`verified.json` names the manifest's fingerprint, which is over every tensor and file; so it says nothing about any other bytes.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import VERIFIED, read_json
from compress.errors import InputError, MachineError

if TYPE_CHECKING:
    from compress.evaluate.verify import Reading

_OURS = "ours"
"""Our own reading of the files, which is what readers are compared with."""


def verified_by(artifact: Path) -> dict[str, dict[str, Any]]:
    """The readers that have verified the artifact that lies there now, with what each has measured. Raises InputError."""
    manifest = Manifest.read(artifact)
    try:
        found = read_json(artifact / VERIFIED)
    except InputError:
        return {}
    readers = found.get("readers")
    same = manifest is not None and found.get("fingerprint") == manifest.fingerprint
    return (
        {name: facts for name, facts in readers.items() if isinstance(facts, dict)} if same and isinstance(readers, dict) else {}
    )


def record(artifact: Path, readings: Sequence[Reading]) -> Path | None:
    """Adds readings to the record; None where there is nothing to record. Raises MachineError where it cannot be written."""
    manifest = Manifest.read(artifact)
    others = [reading for reading in readings if reading.reader != _OURS and reading.equal]
    if manifest is None or not others:
        return None
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    new = {reading.reader: {**asdict(reading), "when": when} for reading in others}
    content = {"fingerprint": manifest.fingerprint, "readers": {**verified_by(artifact), **new}}
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{VERIFIED}.", dir=artifact)
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        os.chmod(name, 0o644)
        os.replace(name, artifact / VERIFIED)
    except OSError as error:
        raise MachineError(
            str(artifact),
            "a place to write",
            error.strerror or str(error),
            "copy the artifact to where you may write, and verify it there",
        ) from None
    return artifact / VERIFIED
