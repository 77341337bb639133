"""Rotations: which tensors rotate with the residual stream and with values.

R1 rotates the residual stream x to x R: embeddings and what writes into the stream are multiplied by R along their hidden
channels, and so is what reads it. A norm stands between the stream and its readers. Without its gain an RMSNorm commutes with a
rotation, since that keeps the mean square; so its gain goes into the columns of its readers first, and ones are left (zeros
where the family adds one). R2 rotates the values of each head, which attention only adds up, and is undone in the columns of the
output projection; query heads that share values share R2. (QuaRot, Ashkboos et al., 2404.00456; SpinQuant, Liu et al.,
2405.16406; without rotations at run time.) Who reads a norm, and who writes values, is the table of families.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from compress.architecture.axes import POST_NORMS, dims_of
from compress.architecture.families import Space, layout
from compress.errors import InputError, Refusal, UsageError
from compress.numerics.rotation import Kind, said
from compress.spec.kept import Sizes
from compress.spec.weight_state import Note, Weight, counted

R1_FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "granite", "gemma", "phi3", "mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss",
)  # fmt: skip
"""Families whose residual stream is read through RMSNorms only, and to which nothing else is added."""
R1 = "R1"
_DO = "quantize without rotating"


class Axis(NamedTuple):
    """Entries of a stored dimension that are rotated, as many at a time as the rotation has channels."""

    place: int
    key: str
    """R1, or the block whose values are rotated."""
    first: int
    size: int


@dataclass(frozen=True)
class Turn:
    """What becomes of one tensor."""

    weight: Weight
    axes: tuple[Axis, ...]
    source: str
    """The tensor that it is made of; another one for a head that was tied to the embeddings."""
    norm: Weight | None = None
    """The norm whose gain goes into it, along the axis of R1."""
    constant: bool = False
    """Whether it is such a norm, of whose gain nothing is left."""

    @property
    def has_r1(self) -> bool:
        return any(axis.key == R1 for axis in self.axes)


@dataclass(frozen=True)
class Rotations:
    """Every tensor that a rotation changes, by name."""

    turns: Mapping[str, Turn]
    kind: Kind
    hidden: int
    """Channels of R1."""
    head: int
    """Channels of R2."""
    plus: float
    """What the family adds to a norm's weight."""

    @property
    def weights(self) -> list[Weight]:
        return [turn.weight for turn in self.turns.values()]

    @property
    def notes(self) -> list[Note]:
        """Counted lines for the manifest."""
        done: dict[str, str] = {}
        for name, turn in self.turns.items():
            words = {R1: f"R1, residual stream: {said(self.hidden, self.kind)}"} | {
                axis.key: f"R2, values of each head: {said(self.head, self.kind)}" for axis in turn.axes if axis.key != R1
            }
            gain = "a norm's gain, which its readers have now"
            done[name] = gain if turn.constant else "; ".join(dict.fromkeys(words[axis.key] for axis in turn.axes))
        new = [turn.weight for turn in self.turns.values() if turn.source != turn.weight.name]
        untied = {w.name: f"a matrix of its own, {w.nbytes:,} bytes more: the last norm's gain is in the head alone" for w in new}
        return [*counted("rotated", done), *counted("untied", untied)]

    def within(self, names: set[str]) -> Rotations:
        """The same, if `names` are all of them. Raises UsageError."""
        if lost := [name for name in self.turns if name not in names]:
            got = f"'{lost[0]}', which would stay as it is"
            raise UsageError("--allow-skips", "a rotation of all that touches the residual stream", got, "leave it out")
        return self


def spaces_of(weights: Sequence[Weight], family: str, config: dict[str, Any], r1: bool, r2: bool) -> tuple[Space, ...]:
    """The activations of a family whose function R1 and R2 keep. Raises InputError for another."""
    try:
        spaces = layout(weights, family, config, frozenset(weight.name for weight in weights)).spaces
    except InputError as error:
        if r1:
            _refuse(weights, family, _DO)
        raise InputError(f"model_type '{family}'", "a family whose values are known here", error.problems[0].got, _DO) from None
    values = any(map(_of_values, spaces))
    if r1:
        _refuse(weights, family, f"{_DO}, or only values with r1=false" if values else _DO)
    if r2 and not values:
        got = "values that are written between queries and keys"
        raise InputError(f"model_type '{family}'", "values that are rows of a linear, for R2", got, _DO)
    if r2 and config.get("clip_qkv") is not None:
        raise InputError("config.json", "values that nothing clips, for R2", f"clip_qkv {config['clip_qkv']}", "give r2=false")
    return spaces


def rotations(
    weights: Sequence[Weight], family: str, spaces: Sequence[Space], sizes: Sizes, r1: bool, r2: bool, kind: Kind
) -> Rotations:
    """What R1 and R2 do to the tensors of a model. Raises InputError for a tensor that does not fit its family."""
    found = {weight.name: list[Axis]() for weight in weights if weight.module}
    norms = _gains(weights, family, spaces, found, sizes) if r1 else {}
    for name, axis in _values(spaces, sizes) if r2 else ():
        found[name].append(axis)
    alone = {norm.name for norm in norms.values()}
    turns = {
        weight.name: Turn(weight, tuple(found[weight.name]), weight.name, norms.get(weight.name), weight.name in alone)
        for weight in weights
        if weight.name in found and (found[weight.name] or weight.name in alone)
    }
    return Rotations(turns, kind, sizes.hidden, sizes.head, float(any(space.how == "norm+1" for space in spaces)))


def _of_values(space: Space) -> bool:
    return space.name == "attention.out"


def _refuse(weights: Sequence[Weight], family: str, do: str) -> None:
    """Raises InputError for a family whose residual stream cannot be rotated."""
    inside = (weight for weight in weights if weight.block is not None and not weight.stack.startswith("tower:"))
    kinds = {weight.module_class for weight in inside if weight.kind == "norm"}
    means = sorted(kind for kind in kinds if kind.endswith("LayerNorm") and not kind.startswith("T5"))
    if means:
        got = f"{means[0]}, which subtracts the mean of all channels: rotated, that is another number"
    elif family in POST_NORMS:
        got = f"{POST_NORMS[family][0]}, whose gain is for channels of what is added to the stream: rotated, there are none"
    elif family not in R1_FAMILIES:
        got = f"another one: what reads and writes its residual stream is not in the table of {', '.join(R1_FAMILIES)}"
    else:
        return
    expected = "a family whose residual stream is read through RMSNorms and through nothing else"
    raise InputError(f"model_type '{family}'", expected, got, do)


def _gains(
    weights: Sequence[Weight], family: str, spaces: Sequence[Space], found: dict[str, list[Axis]], sizes: Sizes
) -> dict[str, Weight]:
    """Adds R1 to the axes of tensors; returns the norm of each that reads the stream. Raises InputError."""
    norms = {reader.name: space.writer for space in spaces if space.how != "rows" for reader in space.readers}
    read = {norm.name for norm in norms.values()}
    last = [weight for weight in weights if weight.kind == "norm" and weight.block is None and weight.module]
    for weight in weights:
        if not weight.module:
            continue
        try:
            dims = dims_of(weight, family)
        except Refusal as refusal:
            raise InputError(f"'{weight.name}'", "a tensor that the table of its family has", refusal.reason, _DO) from None
        if "hidden" not in dims:
            continue
        place = dims.index("hidden")
        if weight.kind == "head" and len(last) == 1:
            norms[weight.name] = last[0]
        if weight.kind == "norm":
            known = weight.name in read or weight in last
        else:
            reads = len(dims) > 1 and weight.kind != "bias" and place == len(dims) - (2 if weight.transposed else 1)
            known = not reads or weight.kind == "embedding" or weight.name in norms
            found[weight.name].append(Axis(place, R1, 0, sizes.hidden))
        if not known or weight.shape[place] != sizes.hidden:
            got = f"{weight.module_class}.{weight.attribute} {list(weight.shape)}"
            raise InputError(f"'{weight.name}'", "a norm, or a matrix behind one, of the residual stream", got, _DO)
    return norms


def _values(spaces: Sequence[Space], sizes: Sizes) -> Iterator[tuple[str, Axis]]:
    """The axes of R2: rows of what writes values, and columns of what reads them. Raises InputError."""
    for space in filter(_of_values, spaces):
        if space.width % sizes.head:
            got = f"{space.width} rows of values in heads of {sizes.head}"
            raise InputError(f"'{space.writer.name}'", "whole heads", got, "give r2=false")
        yield space.writer.name, Axis(int(space.writer.transposed), space.block, space.first_row, space.width)
        if space.bias is not None:
            yield space.bias.name, Axis(0, space.block, space.first_row, space.width)
        for reader in space.readers:
            yield reader.name, Axis(int(not reader.transposed), space.block, 0, reader.in_features)
