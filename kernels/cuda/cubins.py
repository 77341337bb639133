"""Cubins: compiled kernels, from shipped archives, or from NVRTC and a cache.

An archive `cubins/<target>.zip` holds `<variant>.cubin` (`.ptx` for compute_80) and `index.json`, with the version of NVRTC,
the digests of the sources and the options of each variant. Entries whose sources or options differ from the current ones
are ignored.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from compress.checkpoint.cache import folder_of
from compress.errors import MachineError, Refusal
from compress.kernels.cuda.nvrtc import nvrtc
from compress.kernels.cuda.variant import Variant, headers

FOLDER = Path(__file__).parent / "cubins"
TARGETS = ("sm_75", "sm_80", "sm_89", "sm_90a", "compute_80")
INDEX = "index.json"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_LOG = logging.getLogger("compress")


class Capability(NamedTuple):
    """The compute capability of a GPU, such as 9.0 for an H100."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @property
    def number(self) -> int:
        return 10 * self.major + self.minor


@dataclass(frozen=True)
class Code:
    """Machine code or PTX that the driver can load."""

    origin: str
    """A text about its origin."""
    image: bytes


def find(variant: Variant, capability: Capability) -> Code:
    """The code of a variant for GPUs of a compute capability. Raises MachineError if there is none and none can be made."""
    target, passed = _shipped(variant, capability)
    if target is None:
        return _compiled(variant, capability, passed)
    return Code(archive(target).name, _read_member(archive(target), member(variant, target)))


def origin(variant: Variant, capability: Capability) -> str:
    """Where `find` would get the code. Raises Refusal if it would not find any."""
    passed: list[str] = []
    try:
        target, passed = _shipped(variant, capability)
        return f"NVRTC {nvrtc().version}" if target is None else archive(target).name
    except MachineError as error:
        problem = error.problems[0]
        reasons = "; ".join([*passed, f"{problem.where}: {problem.got}"])
        raise Refusal(f"there is no {variant} for capability {capability}: {reasons}", problem.do) from None


def targets(capability: Capability) -> tuple[str, ...]:
    """The archives whose code runs on a GPU, the best first: those of the same major version, then PTX."""
    runs = range(10 * capability.major, capability.number + 1)
    same = [target for target in reversed(TARGETS) if target.startswith("sm_") and int(target[3:5]) in runs]
    return (*same, *(["compute_80"] if capability.major >= 8 else []))


def archive(target: str) -> Path:
    return FOLDER / f"{target}.zip"


def member(variant: Variant, target: str) -> str:
    """The name of a variant's file in an archive."""
    return f"{variant}.{'cubin' if target.startswith('sm_') else 'ptx'}"


def passed_over(variant: Variant, target: str) -> str:
    """Why an archive has no usable code of a variant; empty if it has. Raises MachineError for a damaged archive."""
    index = _index(archive(target))
    if index is None:
        return "is not there"
    if str(variant) not in index["options"]:
        return "does not hold it"
    if index["sources"][variant.source] != variant.digest or index["options"][str(variant)] != list(variant.options):
        return "was built from other sources"
    return ""


def pack(target: str, compiler: str, images: dict[Variant, bytes]) -> None:
    """Writes an archive: the same bytes for the same images."""
    index = {
        "nvrtc": compiler,
        "sources": {variant.source: variant.digest for variant in images},
        "options": {str(variant): variant.options for variant in images},
    }
    members = {INDEX: json.dumps(index, indent=1, sort_keys=True).encode()}
    members |= {member(variant, target): image for variant, image in images.items()}
    FOLDER.mkdir(exist_ok=True)
    with zipfile.ZipFile(archive(target), "w") as out:
        for name in sorted(members):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            out.writestr(entry, members[name], zipfile.ZIP_LZMA)
    _index.cache_clear()


def stale(target: str, wanted: Iterable[Variant]) -> list[str]:
    """What `pack` would change in an archive, a text for each change."""
    index, names = _index(archive(target)), {str(variant) for variant in wanted}
    found = [f"{variant} {reason}" for variant in wanted if (reason := passed_over(variant, target))]
    return found + [f"{name} is not wanted" for name in sorted(set(index["options"] if index else ()) - names)]


@lru_cache(maxsize=8)
def _index(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(_read_member(path, INDEX))
    return found


def _read_member(path: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as held:
            return held.read(name)
    except Exception as error:  # damaged archives raise many kinds of errors
        raise MachineError(f"{path}, {name}", "an archive of cubins", str(error), "install compress again") from None


def _shipped(variant: Variant, capability: Capability) -> tuple[str | None, list[str]]:
    """The first archive with the code of a variant, if any, and why others were passed over."""
    passed: list[str] = []
    for target in targets(capability):
        reason = passed_over(variant, target)
        if not reason:
            return target, passed
        passed.append(f"{archive(target).name} {reason}")
    return None, passed


def _compiled(variant: Variant, capability: Capability, passed: list[str]) -> Code:
    """The code from NVRTC's cache, or compiled now."""
    compiler = nvrtc()
    target = _native(capability, compiler.architectures)
    place = folder_of("kernels") / variant.key(target, compiler.version)
    image = _read(place)
    if image is None:
        _LOG.info("NVRTC %s compiles %s for %s: %s", compiler.version, variant, target, "; ".join(passed))
        image = compiler.compile(f"{variant.source}.cu", variant.text, headers(), target, variant.options)
        _write(place, image)
    return Code(f"NVRTC {compiler.version}, {target}", image)


def _native(capability: Capability, known: tuple[int, ...]) -> str:
    """The target for NVRTC: the GPU itself, or PTX for the newest known architecture that is not newer than the GPU."""
    wanted = capability.number
    if wanted in known:
        return "sm_90a" if wanted == 90 else f"sm_{wanted}"
    return f"compute_{max(number for number in known if number < wanted)}"


def _read(place: Path) -> bytes | None:
    """Reads an entry of the cache: a hash, then the code. None if it is missing or damaged."""
    try:
        held = place.read_bytes()
    except OSError:
        return None
    if sha256(held[32:]).digest() != held[:32]:
        _LOG.warning("%s is damaged and made anew", place)
        return None
    return held[32:]


def _write(place: Path, image: bytes) -> None:
    """Writes under another name first, so that other processes only ever see a complete entry."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as new:
            try:
                new.write(sha256(image).digest() + image)
                new.close()
                os.replace(new.name, place)
            finally:
                Path(new.name).unlink(missing_ok=True)
    except OSError as error:
        _LOG.warning("a compiled kernel cannot be kept: %s; set COMPRESS_CACHE to a folder that can be written", error)
