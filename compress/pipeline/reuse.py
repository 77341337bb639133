"""Reuse: takes steps that another run has finished, found by their ids.

A step's id covers everything that determines its bytes, so a step of the same id can be used, whatever followed it there. It is
put among the steps of this run, with hard links to shards that are read-only if the file system has links, or into OUT as a
copy. Published steps never change, so the other run's lock is not needed: a step that vanishes or is damaged meanwhile is
detected by its digests, which are checked after copying and before the step is put in place.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.checkpoint.manifest import FILE, Manifest
from compress.checkpoint.reader import INDEXES, open_checkpoint
from compress.checkpoint.writer import fsync
from compress.context import Context
from compress.contract.step_plan import Plan, StepPlan
from compress.errors import InputError, MachineError, UsageError
from compress.pipeline.output_paths import stem, steps_folder
from compress.pipeline.resume import check_bytes, check_tokens

IdOf = Callable[[StepPlan, str], str]
"""(step, fingerprint of the checkpoint that it reads) -> the step's id."""


@dataclass(frozen=True)
class ReusedStep:
    """A step that was not run, and the directory where it was found."""

    number: int
    name: str
    where: Path

    @property
    def folder(self) -> Path:
        """The steps folder, or the output, that it was found in."""
        return self.where.parent if self.where.parent.name.endswith(".steps") else self.where


def searched(given: Sequence[Path]) -> list[Path]:
    """The directories to search for `--steps`: a steps folder, or an output and its steps. Raises UsageError."""
    found = []
    for path in given:
        path = Path(os.path.abspath(path))
        if not path.is_dir() and not steps_folder(path).is_dir():
            raise UsageError(f"--steps {path}", "the OUT of another run, or its OUT.steps", "no such directory")
        found += [folder for folder in (path, steps_folder(path)) if folder.is_dir()]
    return found


def solved(plan: Plan, folders: Sequence[Path], id_of: IdOf, fingerprint: str) -> Iterator[tuple[StepPlan, str, Path]]:
    """(step, id, directory) of a plan's steps found in `folders`, up to the first missing one that writes weights."""
    for step in plan.steps:
        identity = id_of(step, fingerprint)
        found = _find(step, identity, folders)
        if found is not None:
            yield step, identity, found[0]
        elif not step.inherits:
            return
        if found is not None and not step.inherits:
            fingerprint = found[1].fingerprint


def take_steps(plan: Plan, out: Path, given: Sequence[Path], id_of: IdOf, fingerprint: str, ctx: Context) -> list[ReusedStep]:
    """Takes finished steps from `given` directories (see `searched`) to where this run looks for them; returns them."""
    own, taken = steps_folder(out), []
    for step, identity, found in solved(plan, [own, *given], id_of, fingerprint):
        last = step is plan.steps[-1]
        if found.parent == own and not last:
            continue
        place = out if last else own / stem(step.number, step.name, identity)
        if (last and not _same_layout(step, found)) or not _take(step, found, place, own, ctx):
            break
        taken.append(ReusedStep(step.number, step.name, found))
    return taken


def _find(step: StepPlan, identity: str, folders: Sequence[Path]) -> tuple[Path, Manifest] | None:
    """The directory of a step, and its manifest."""
    for folder in folders:
        for place in (folder, *sorted(folder.glob(f"*-{step.name}-{identity[:8]}"))):
            try:
                manifest = Manifest.read(place)
            except InputError:
                continue
            # A calibration step holds only tokens, but also the weights if it was the last of its run.
            if manifest is not None and manifest.lineage[-1].id == identity and step.inherits == (manifest.format == "tokens"):
                return place, manifest
    return None


def _same_layout(step: StepPlan, found: Path) -> bool:
    """Whether a canonical step has the shards that OUT will have; a packed one is made anew, which is fast."""
    if step.format is not None or step.pass_.allocator() is not None:
        return False
    return all((found / s.file).is_file() and (found / s.file).stat().st_size == s.nbytes for s in step.shards)


def _take(step: StepPlan, found: Path, place: Path, own: Path, ctx: Context) -> bool:
    """Copies or links a step to `place`. False if it is damaged or gone."""
    draft = own / f"{place.name}.taken"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        for name in _files(step, found):
            (draft / name).parent.mkdir(exist_ok=True)
            _put(found / name, draft / name, link=place.parent == own)
        check_tokens(draft) if step.inherits else check_bytes(draft, ctx)
        os.rename(draft, place)
        fsync(place.parent)
    except (InputError, FileNotFoundError) as error:
        ctx.tell("damaged", where=str(found), reason=str(error))
        shutil.rmtree(draft, ignore_errors=True)
        return False
    except OSError as error:
        do = "free some space, or leave --steps out to make the step anew"
        raise MachineError(str(draft), "a place for a step", error.strerror or str(error), do) from None
    # Partial results of an interrupted run.
    shutil.rmtree(own / f"{place.name}.tmp", ignore_errors=True)
    ctx.tell("taken", step=step.name, where=str(found))
    return True


def _files(step: StepPlan, found: Path) -> list[str]:
    """The files of a step; other files in its directory are not taken."""
    manifest = Manifest.read(found)
    assert manifest is not None
    names = {FILE, *manifest.files}
    if not step.inherits:
        checkpoint = open_checkpoint(found)
        names |= {ref.file for ref in checkpoint.refs.values()} | {name for name in INDEXES if (found / name).is_file()}
    return sorted(names)


def _put(source: Path, target: Path, link: bool) -> None:
    """Links a read-only file, or copies it."""
    read_only = not source.stat().st_mode & 0o222
    if link and read_only:
        try:
            os.link(source, target)
            return
        except OSError:
            # Another file system, or one without links.
            pass
    shutil.copyfile(source, target)
    if link and read_only:
        target.chmod(0o444)
    fsync(target)
