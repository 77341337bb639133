"""Kept: which parts of a model a smaller one has kept, and how many there are.

    layers    blocks of the text model
    hidden    channels of the residual stream
    groups    key-value heads; each is read by as many query heads
    queries   query heads, in the order of the groups that they read
    units     neurons of a feed-forward: `mlp`, `shared`, or the number of a routed expert
    experts   routed experts of a block

Numbers are those of the source. They are ordered as the smaller model has them, so that an order alone is said in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

MLP, SHARED = "mlp", "shared"
"""Names of a block's dense feed-forward, and of the expert that every token is sent to."""
_RANGES = re.compile(r"(?:\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)?", re.ASCII)


@dataclass(frozen=True)
class Sizes:
    """How large each part of a model's structure is; 0 for a part that it does not have."""

    layers: int
    hidden: int
    queries: int
    """Query heads of a block."""
    groups: int
    """Key-value heads of a block."""
    head: int
    """Channels of a head."""
    units: int = 0
    """Neurons of a dense feed-forward."""
    experts: int = 0
    expert_units: int = 0
    shared_units: int = 0

    @property
    def share(self) -> int:
        """Query heads that read one key-value head."""
        return self.queries // self.groups

    def __str__(self) -> str:
        parts = {
            "layers": self.layers, "hidden": self.hidden, "heads": self.queries, "kv_heads": self.groups, "ffn": self.units,
            "experts": self.experts, "expert_ffn": self.expert_units, "shared_ffn": self.shared_units,
        }  # fmt: skip
        return ", ".join(f"{name} {size}" for name, size in parts.items() if size)

    def changes(self, after: Sizes) -> str:
        """What differs in `after`, in words."""
        pairs = zip(str(self).split(", "), str(after).split(", "), strict=True)
        return ", ".join(f"{a} -> {b.rpartition(' ')[2]}" for a, b in pairs if a != b)


@dataclass(frozen=True)
class KeptBlock:
    """What is kept inside one block."""

    groups: tuple[int, ...]
    queries: tuple[int, ...]
    units: dict[str, tuple[int, ...]] = field(default_factory=dict)
    experts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Kept:
    """The parts of a source that a smaller model consists of; `blocks` has an entry for each kept layer."""

    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    blocks: tuple[KeptBlock, ...]

    @classmethod
    def first(cls, sizes: Sizes, source: Sizes) -> Kept:
        """The first parts of each kind, as many as `sizes` has."""
        groups = tuple(range(sizes.groups))
        # Where more queries share a head than before, heads were joined, and all queries stay.
        share = min(sizes.share, source.share)
        queries = tuple(group * source.share + n for group in range(sizes.queries // share) for n in range(share))
        units = {MLP: tuple(range(sizes.units))} if sizes.units else {}
        if sizes.shared_units:
            units[SHARED] = tuple(range(sizes.shared_units))
        experts = tuple(range(sizes.experts))
        units |= {str(expert): tuple(range(sizes.expert_units)) for expert in experts}
        block = KeptBlock(groups, queries, units, experts)
        return cls(tuple(range(sizes.layers)), tuple(range(sizes.hidden)), (block,) * sizes.layers)

    def of(self, earlier: Kept) -> Kept:
        """The same parts by the numbers of the source that `earlier` was cut out of."""
        blocks = []
        for layer, block in zip(self.layers, self.blocks, strict=True):
            old = earlier.blocks[layer]
            experts = picked(old.experts, block.experts)
            units = {}
            for name, numbers in block.units.items():
                before = name if not name.isdigit() else str(old.experts[int(name)])
                units[before] = picked(old.units[before], numbers)
            blocks.append(KeptBlock(picked(old.groups, block.groups), picked(old.queries, block.queries), units, experts))
        return Kept(picked(earlier.layers, self.layers), picked(earlier.hidden, self.hidden), tuple(blocks))

    def to_json(self) -> dict[str, Any]:
        """As JSON, with numbers as ranges in text: `0-3,7`."""
        return {
            "layers": text_of(self.layers),
            "hidden": text_of(self.hidden),
            "blocks": [
                {
                    "groups": text_of(block.groups), "queries": text_of(block.queries), "experts": text_of(block.experts),
                    "units": {name: text_of(numbers) for name, numbers in block.units.items()},
                }
                for block in self.blocks
            ],
        }  # fmt: skip

    @classmethod
    def from_json(cls, content: Any) -> Kept:
        """The inverse of `to_json`. Raises ValueError."""
        try:
            blocks = tuple(
                KeptBlock(
                    numbers_of(block["groups"]), numbers_of(block["queries"]),
                    {str(name): numbers_of(text) for name, text in block["units"].items()}, numbers_of(block["experts"]),
                )
                for block in content["blocks"]
            )  # fmt: skip
            kept = cls(numbers_of(content["layers"]), numbers_of(content["hidden"]), blocks)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"layers, hidden and blocks, each with its parts: {error}") from None
        if len(kept.layers) != len(kept.blocks):
            raise ValueError(f"{len(kept.layers)} layers, but {len(kept.blocks)} blocks")
        return kept


def picked(numbers: Sequence[int], at: Iterable[int]) -> tuple[int, ...]:
    """The numbers at these places."""
    return tuple(numbers[place] for place in at)


def text_of(numbers: Sequence[int]) -> str:
    """Numbers as ranges: `0-3,7,5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


_MOST = 1 << 20


def numbers_of(text: str) -> tuple[int, ...]:
    """The inverse of `text_of`. Raises ValueError."""
    if not isinstance(text, str) or _RANGES.fullmatch(text) is None:
        raise ValueError(f"ranges of numbers, not {text!r}")
    found: list[int] = []
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        if int(last or first) - int(first) > _MOST:
            raise ValueError(f"a range of at most {_MOST} numbers, not {part}")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)
