"""Weight state: the form of each weight, before and after every pass.

A Weight is one tensor of the source, by its name on disk, with its place in the model.
A State is its form: `dense`, `masked(sparsity)`, `codes(scheme)`, or codes that are also masked, or have outliers,
kept columns or low-rank factors. Replaying states over a recipe is a type check that reads no data: a pass returns the state
that a weight will have, or refuses it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import Literal, NamedTuple, Self

from compress.spec.corrections import Columns, Lowrank, Outliers
from compress.spec.scheme import Scheme
from compress.spec.sparsity import Sparsity

Kind = Literal["linear", "expert", "embedding", "head", "router", "norm", "bias", "convolution", "cache", "other"]
"""`cache`: a scale of keys or values, which is not of the source: quantize.kv has added it."""
MATRICES: frozenset[str] = frozenset({"linear", "expert", "embedding", "head"})
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
FLOATS: frozenset[str] = frozenset({"F32", "F16", "BF16"})
UNREACHED = "no text reaches it"
"""Why nothing that reads text changes a tower (vision, audio), or what joins it to the text model."""


class _Spec(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    """Payload bytes."""


class TensorSpec(_Spec):
    """A tensor to be written: name on disk, safetensors dtype, shape. A tuple, for a large model has a million of them."""

    __slots__ = ()

    def __new__(cls, name: str, dtype: str, shape: tuple[int, ...]) -> Self:
        return tuple.__new__(cls, (name, dtype, shape, _payload(dtype, shape)))


@lru_cache(maxsize=1024)
def _payload(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BYTES[dtype]


_nbytes = attrgetter("nbytes")


def payload_bytes(specs: Iterable[TensorSpec]) -> int:
    """Payload bytes of all tensors."""
    return sum(map(_nbytes, specs))


@dataclass(frozen=True)
class Weight:
    """One tensor of the source checkpoint and its place in the model.

    `shape` is the stored one: `[out, in]`, or `[in, out]` when `transposed` (Conv1D, GPT-OSS), with
    the experts in front when they are fused. `module` is the path in transformers' model, which
    differs from the name on disk where transformers renames or fuses on load.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: Kind = "other"
    module: str = ""
    attribute: str = "weight"
    """The parameter's name in its module; fused experts have several."""
    module_class: str = ""
    stack: str = ""
    block: int | None = None
    transposed: bool = False
    converted: bool = False
    """Whether transformers fuses, splits or permutes this tensor while it loads."""
    unclear: str = ""
    """Why a matrix cannot be used (its orientation is unknown), or empty."""
    unlearned: str = ""
    """Why a loss on texts gives it no gradient, or empty."""
    left_alone: str = ""
    """Why passes leave it alone unless told otherwise, or empty; see architecture/left_alone.py."""
    peak: float | None = None
    """The largest magnitude of it and the weights that readers fuse it with, if an executor measured it; see fused_groups.py."""

    @property
    def out_features(self) -> int:
        return self.shape[-1] if self.transposed else self.shape[-2]

    @property
    def in_features(self) -> int:
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def rows(self) -> int:
        """Rows of the quantized form: outputs. A Conv1D keeps its stored order, as its only reader does."""
        return self.shape[0] if len(self.shape) == 2 else self.out_features

    @property
    def columns(self) -> int:
        """Columns of the quantized form, along which groups run: inputs, outputs for a Conv1D."""
        return self.shape[1] if len(self.shape) == 2 else self.in_features

    @property
    def experts(self) -> int | None:
        """Leading dimension of fused experts, None for a plain matrix."""
        return self.shape[0] if len(self.shape) == 3 else None

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


_STATE = re.compile(
    r"dense|masked\((?P<alone>[^()]+)\)|codes\((?P<scheme>[^()]+)\)(?:\+masked\((?P<sparsity>[^()]+)\))?"
    r"(?:\+outliers\((?P<outliers>[^()]+)\))?(?:\+columns\((?P<columns>[^()]+)\))?(?:\+lowrank\((?P<lowrank>[^()]+)\))?"
)


@dataclass(frozen=True)
class State:
    """The form of one weight: `dense`, `masked(2:4)`, `codes(w4a16g64)`, `codes(w4a16g64)+masked(2:4)`,
    `codes(w2a16g64-asym)+outliers(0.005)+lowrank(r8)`, `codes(w4a4-aasym)+columns(256)`.

    Without a scheme the weight is stored as a plain tensor. Parses and prints back.
    """

    scheme: Scheme | None = None
    sparsity: Sparsity | None = None
    outliers: Outliers | None = None
    lowrank: Lowrank | None = None
    columns: Columns | None = None

    @classmethod
    def parse(cls, text: str) -> State:
        match = _STATE.fullmatch(text)
        if match is None:
            raise ValueError(f"unknown state '{text}'")
        sparsity = match["sparsity"] or match["alone"]
        return cls(
            Scheme.parse(match["scheme"]) if match["scheme"] else None,
            Sparsity.parse(sparsity) if sparsity else None,
            Outliers.parse(match["outliers"]) if match["outliers"] else None,
            Lowrank.parse(match["lowrank"]) if match["lowrank"] else None,
            Columns.parse(match["columns"]) if match["columns"] else None,
        )

    @cached_property
    def _hash(self) -> int:
        return hash((self.scheme, self.sparsity, self.outliers, self.lowrank, self.columns))

    def __hash__(self) -> int:
        return self._hash

    def beside(self) -> dict[str, object]:
        """What stands beside its codes, by its word."""
        words = {"outliers": self.outliers, "columns": self.columns, "lowrank": self.lowrank}
        return {word: part for word, part in words.items() if part is not None}

    def needs(self) -> dict[str, object]:
        """What a reader has to know besides codes, by its word."""
        mixed = self.scheme.hadamard if self.scheme is not None else 0
        return self.beside() | ({"rotation": f"h{mixed}"} if mixed else {})

    def __str__(self) -> str:
        words = {"codes": self.scheme, "masked": self.sparsity, **self.beside()}
        return "+".join(f"{word}({part})" for word, part in words.items() if part is not None) or "dense"


DENSE = State()


@dataclass(frozen=True)
class Note:
    """A counted line of the manifest: something that a user of the result must know.

    `what` is a short stable word (`untouched`, `skipped`, `ragged`, ...), `reason` says why in words.
    """

    what: str
    reason: str
    names: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.names)


def counted(what: str, reasons: Mapping[str, str]) -> list[Note]:
    """Groups names by reason into counted lines."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    return [Note(what, reason, tuple(names)) for reason, names in by_reason.items()]


def blocks(weights: Iterable[Weight]) -> int:
    """The number of blocks that hold these weights."""
    return len({(weight.stack, weight.block) for weight in weights})
