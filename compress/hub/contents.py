"""Contents: what is pushed of an artifact, and what must hold for it.

It is packed or dense, a reader has verified these bytes, its licence is known, and it has no weights or Python that its manifest
does not name.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import (
    ADAPTER_CONFIG,
    CALIBRATION,
    README,
    Checkpoint,
    check_file,
    is_weights,
    open_checkpoint,
    read_json,
)
from compress.checkpoint.scan import scan_source
from compress.context import Context
from compress.errors import InputError, Problem, UsageError, did_you_mean
from compress.evaluate.readers import READERS
from compress.evaluate.records import verified_by
from compress.hub.card import fields, licence_of
from compress.spec.push import PushOptions
from compress.spec.weight_state import State

DENSE = "dense"
"""The format of weights that are not in codes, as readers name it."""
_RESULTS = ".eval_results"
"""The folder in which the Hub looks for results of evaluations."""


@dataclass(frozen=True)
class Contents:
    """The files of an artifact by their names on the Hub, and what is known of it."""

    checkpoint: Checkpoint
    manifest: Manifest
    files: dict[str, Path]
    licence: dict[str, Any]
    """The metadata of its card that says the licence."""
    readers: tuple[str, ...]
    """Those that have verified it."""

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    @property
    def tokens(self) -> bool:
        """Whether the tokens of a calibration text are among the files."""
        return CALIBRATION in self.files

    def texts(self, repo: str) -> dict[str, str]:
        """Files that are other in a repository: an adapter names its base, which is there and not in a directory of ours."""
        if ADAPTER_CONFIG not in self.files:
            return {}
        content = {**read_json(self.files[ADAPTER_CONFIG]), "base_model_name_or_path": repo}
        return {ADAPTER_CONFIG: json.dumps(content, indent=2, ensure_ascii=False) + "\n"}

    def check_bytes(self, ctx: Context) -> None:
        """Reads every byte. Raises InputError for any that is not as the manifest, and so the record, has it."""
        try:
            scan_source(self.checkpoint, ctx, allow_nonfinite=True)
        finally:
            self.checkpoint.close()


def contents_of(artifact: Path, options: PushOptions) -> Contents:
    """What would be pushed. Raises InputError or UsageError with everything that is wrong."""
    if not artifact.is_dir():
        there = [path.name for path in artifact.absolute().parent.glob("*") if path.is_dir()]
        got = "a file" if artifact.exists() else f"no such directory{did_you_mean(artifact.name, there)}"
        do = "give the artifact first, then OWNER/NAME" if Path(options.repo).is_dir() else "check the path"
        raise InputError(str(artifact), "the directory of an artifact", got, do)
    checkpoint = open_checkpoint(artifact)
    manifest = checkpoint.manifest
    if manifest is None:
        do = "push it with `hf upload`, or make an artifact of it with `compress run`"
        raise InputError(str(artifact), "an artifact, with the manifest.json of compress", "none", do)
    refuse_unpacked(artifact, manifest)
    files = dict(_files(artifact))
    shards = {ref.file for ref in checkpoint.refs.values()}
    named = {*manifest.files, *shards, *(name for name in files if name.endswith(".safetensors.index.json"))}
    foreign = [name for name in files if name not in named and (is_weights(name) or name.endswith(".py"))]
    problems = [
        Problem(str(artifact / name), "weights and code that manifest.json names", "a file that it does not", "take it out")
        for name in foreign
    ]
    readers = verified_by(artifact)
    if not readers and not options.unverified:
        command = shlex.join(["compress", "verify", str(artifact), "--reader", reader_of(format_of(manifest))])
        do = f"{command}; or --unverified, and the card says so"
        problems.append(Problem(str(artifact), "a reader that has verified these bytes", "no record of one", do))
    licence, wrong = licence_of(
        manifest.source.licence_fields(), fields(files.get(README)), manifest.source.licence, options.license
    )
    if problems:
        raise InputError([*problems, *wrong])
    if wrong:
        raise UsageError(wrong)
    return Contents(checkpoint, manifest, files, licence, readers)


def refuse_unpacked(artifact: Path, manifest: Manifest) -> None:
    """Raises InputError for a checkpoint in codes that no reader loads."""
    coded = any(State.parse(record.state).scheme is not None for record in manifest.weights.values())
    if format_of(manifest) == DENSE and coded:
        command = shlex.join(["compress", "pack", str(artifact), f"{artifact}-packed"])
        raise InputError(
            str(artifact), "packed weights, which a reader loads", "codes that are not packed", f"{command}; push that"
        )


def format_of(manifest: Manifest) -> str:
    """The format of an artifact, as readers name it."""
    return DENSE if manifest.format in ("canonical", "tokens") else manifest.format


def reader_of(form: str) -> str:
    """The reader that verifies a format: one that runs in this interpreter, if there is any."""
    able = [name for name, reader in READERS.items() if form in reader.formats]
    here = [name for name in able if READERS[name].environment is None and all(map(find_spec, READERS[name].modules))]
    return next(iter([*here, *able]), "NAME")


def _files(artifact: Path) -> Iterator[tuple[str, Path]]:
    """Every file by its name on the Hub, sorted; hidden ones are left out. Raises InputError for links out of the directory."""
    for folder, folders, names in os.walk(artifact):
        folders[:] = sorted(name for name in folders if not name.startswith(".") or name == _RESULTS)
        if links := [name for name in folders if os.path.islink(os.path.join(folder, name))]:
            raise InputError(os.path.join(folder, links[0]), "a folder", "a link to one", "copy the folder itself there")
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith("."):
                check_file(path)
                yield path.relative_to(artifact).as_posix(), path
