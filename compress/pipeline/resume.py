"""Resume: whether a step is done already, and whole."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import CALIBRATION, open_checkpoint
from compress.checkpoint.scan import file_digest, scan_source
from compress.context import Context
from compress.contract.step_plan import StepPlan
from compress.errors import InputError


def check_bytes(place: Path, ctx: Context) -> None:
    """Reads a checkpoint of ours. Raises InputError if a digest does not match its manifest."""
    checkpoint = open_checkpoint(place)
    try:
        scan_source(checkpoint, replace(ctx, events=lambda event: None), allow_nonfinite=True)
    finally:
        checkpoint.close()


def check_tokens(place: Path) -> None:
    """Reads the calibration tokens of a step. Raises InputError if their digest does not match its manifest."""
    manifest, file = Manifest.read(place), place / CALIBRATION
    if manifest is None or not file.is_file() or file_digest(file) != manifest.files[CALIBRATION]:
        raise InputError(str(file), "the bytes that manifest.json names", "other bytes, or none", "make it anew")


def kept(place: Path, step: StepPlan, ctx: Context) -> bool:
    """Whether a step exists and all digests match its manifest; a damaged one is removed, to be made again."""
    if not place.is_dir():
        return False
    try:
        check_tokens(place) if step.inherits else check_bytes(place, ctx)
    except InputError as error:
        ctx.tell("damaged", where=str(place), reason=str(error))
        shutil.rmtree(place)
        return False
    return True
