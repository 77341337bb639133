"""Step plan: what a step will do, its exact sizes, and the plan of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from compress.architecture.axes import Slice, slices
from compress.architecture.rotations import Rotations
from compress.architecture.weight_map import Model
from compress.checkpoint.safetensors_header import Shard, index_bytes
from compress.contract.format import Format, Verdict
from compress.contract.pass_base import Pass
from compress.numerics import qtensor
from compress.spec.kept import Kept, Sizes
from compress.spec.weight_state import Note, State, TensorSpec, Weight, payload_bytes

INTERPRETER_BYTES = 480 << 20
"""Resident bytes of Python with torch, transformers and one model class imported, measured on Linux x86-64."""


@dataclass(frozen=True)
class Cut:
    """What a step that makes a smaller model starts from, and the sizes that it ends with."""

    family: str
    weights: tuple[Weight, ...]
    """Every weight of the model that it cuts."""
    before: Sizes
    after: Sizes
    config: dict[str, Any]
    """config.json of the model that it cuts, without what says how weights are packed."""
    trained: tuple[Weight, ...] = ()
    """Those of `weights` that are trained before they are cut."""

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return not any(weight.kind == "head" for weight in self.weights)

    def parts(self, kept: Kept) -> list[Slice]:
        """The tensors of the smaller model."""
        return slices(self.weights, self.family, kept.layers, [block.experts for block in kept.blocks])


@dataclass(frozen=True)
class StepPlan:
    """One pass over one checkpoint: the state of every weight before and after, and the layout of the shards."""

    number: int
    pass_: Pass
    weights: tuple[Weight, ...]
    """Every weight of the checkpoint that the step makes, without tied duplicates."""
    targeted: tuple[str, ...]
    skipped: dict[str, str]
    before: dict[str, State]
    after: dict[str, State]
    format: Format | None
    shards: list[Shard]
    stored: dict[str, list[TensorSpec]]
    """The tensors that hold each weight after the step."""
    texts: dict[str, str]
    """config.json, and other files that the format's reader needs, by name."""
    notes: tuple[Note, ...]
    resident_bytes: int
    """Memory in addition to INTERPRETER_BYTES."""
    scratch_bytes: int = 0
    """Temporary disk space while the step runs."""
    device_bytes: int = 0
    """GPU memory, if the run computes on a GPU; 0 for a step that always runs on the CPU."""
    cut: Cut | None = None
    """For a step that makes a smaller model; `before` then has other names than `after`."""
    rotations: Rotations | None = None
    """For a step that rotates: what becomes of each tensor."""

    @property
    def inherits(self) -> bool:
        """Whether the step writes no weights, so that those of the step before hold."""
        return not self.shards

    @property
    def name(self) -> str:
        return self.pass_.pass_name()

    @property
    def transformed(self) -> list[str]:
        return [name for name in self.targeted if name not in self.skipped]

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of tensors."""
        return sum(payload_bytes(shard.specs) for shard in self.shards)

    @cached_property
    def disk_bytes(self) -> int:
        """Bytes of the shards with their headers, the index and config.json; 0 for a step that writes no weights."""
        if self.inherits:
            return 0
        texts = sum(len(text.encode()) for text in self.texts.values())
        return sum(shard.nbytes for shard in self.shards) + index_bytes(self.shards) + texts

    def bits(self, weights: Sequence[Weight]) -> float:
        """Bits per weight of `weights` as stored after this step, scales and padding included."""
        numel = sum(weight.numel for weight in weights)
        return payload_bytes(chain.from_iterable(map(self.specs, weights))) * 8 / numel if numel else 0.0

    def specs(self, weight: Weight) -> list[TensorSpec]:
        """The tensors that hold `weight` after this step."""
        return self.stored[weight.name]


@dataclass(frozen=True)
class Plan:
    """Every step of a recipe over one model."""

    model: Model
    passes: list[Pass]
    steps: list[StepPlan]
    source_bytes: int
    threads: int
    verdicts: tuple[Verdict, ...] = ()

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The weights of the output, without tied duplicates."""
        return self.steps[-1].weights

    @property
    def disk_bytes(self) -> int:
        """Disk space that the run has added when it ends: every step and the output."""
        return sum(step.disk_bytes for step in self.steps)

    @property
    def scratch_bytes(self) -> int:
        """Temporary disk space in addition, while a step runs."""
        return max((step.scratch_bytes for step in self.steps), default=0)

    @property
    def peak_bytes(self) -> int:
        """Peak resident memory: the interpreter and the largest step."""
        return INTERPRETER_BYTES + max((step.resident_bytes for step in self.steps), default=0)

    def bits(self, step: StepPlan, names: Sequence[str] | None = None) -> float:
        """Bits per weight after `step`, scales and padding included; of `names`, or of the whole model."""
        chosen = set(names) if names is not None else None
        return step.bits([w for w in step.weights if chosen is None or w.name in chosen])


def layout_specs(
    fmt: Format | None, weights: Sequence[Weight], states: Mapping[str, State], before: StepPlan | None
) -> dict[str, list[TensorSpec]]:
    """The tensors that hold each weight: canonical ones, or those of a format, which leaves some weights plain.

    What a canonical step `before` over the same weights stores alike is taken from there, for a model has many of them.
    """

    def of(weight: Weight, state: State) -> list[TensorSpec]:
        if fmt is not None and not fmt.plain(weight, state):
            return fmt.specs(weight, state)
        if before is not None and before.format is None:
            # A pass may have added weights, such as scales of keys.
            old = before.after.get(weight.name)
            if old is not None and (old is state or (old.scheme is None and state.scheme is None)):
                return before.stored[weight.name]
        return qtensor.specs(weight, state)

    return {weight.name: of(weight, states[weight.name]) for weight in weights}
