"""Variant: a CUDA source with the options that it is compiled with.

Sources lie in kernels/native/, each with one entry point of its own name, and include nothing but our own headers there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "native"
_STANDARD = "--std=c++17"


@dataclass(frozen=True)
class Variant:
    """A source with options, which is compiled to one cubin."""

    source: str
    """The name of its file and of its entry point: skinny, expand, outliers or finish."""
    name: str
    """The name of this variant among those of the source, such as int4-p4-bf16-bf16-n1."""
    defines: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.source}-{self.name}"

    @property
    def options(self) -> tuple[str, ...]:
        return (_STANDARD, *self.defines)

    @property
    def text(self) -> str:
        """The source."""
        return _files()[f"{self.source}.cu"]

    @property
    def digest(self) -> str:
        """sha256 of the source and the headers."""
        return _digest(self.text)

    def key(self, target: str, compiler: str) -> str:
        """The key of its cubin in the cache: a hash of target, version of NVRTC, sources and options."""
        return sha256(self.digest, *self.options, target, compiler)


def headers() -> dict[str, str]:
    """Header name -> text, for all headers that sources may include."""
    return {name: text for name, text in _files().items() if name.endswith(".cuh")}


def sha256(*texts: str) -> str:
    """sha256 of several texts, which depends on where one ends and the next begins."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@lru_cache(maxsize=8)
def _digest(text: str) -> str:
    return sha256(text, *headers(), *headers().values())


@lru_cache(maxsize=1)
def _files() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(FOLDER.glob("*.cu*"))}
