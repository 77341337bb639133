"""Allocation pass: chooses what each weight becomes, within a budget.

It decides by gradients, or by the weights alone, before bytes are laid out; a pass of another shape, or that it has itself,
then does what was decided, and writes it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

from compress.checkpoint.reader import ALLOCATION
from compress.contract.pass_base import Pass, TargetedPass
from compress.errors import InputError
from compress.numerics.qtensor import specs
from compress.spec.recipe import Line
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    import torch

    from compress.contract.step_plan import StepPlan

_ENTRY_BYTES = 256
"""What headers and index say of a tensor at most, besides its name."""
_DO = f"name the {ALLOCATION[0]} of a step that has decided"


@dataclass(frozen=True)
class Offer:
    """What a weight may become, and what each of that would cost in loss."""

    weight: Weight
    states: tuple[State, ...]
    costs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rest:
    """What a checkpoint holds besides the weights that are decided on."""

    numel: int
    nbytes: int
    """Of its tensors."""
    overhead_bytes: int
    """Headers, index and config.json of the whole checkpoint, at most."""


class AllocationPass(TargetedPass):
    """Chooses what each weight becomes; driven by `decide`, and then by the driver of its `work`."""

    gradients: ClassVar[bool] = True
    """Whether it decides by gradients of the loss, and not by the weights alone."""

    @property
    def decides(self) -> bool:
        """Whether there is anything to decide, with the options that it was given."""
        return True

    def offers(self, weight: Weight, state: State) -> tuple[State, ...]:
        """What a targeted weight may become. Raises Refusal with the reason. Reads no bytes."""
        raise TypeError(f"{type(self).__name__} offers nothing")

    def becomes(self, weight: Weight, state: State) -> State:
        """The largest offer: what is planned until it is decided."""
        return max(self.offers(weight, state), key=lambda after: sum(spec.nbytes for spec in specs(weight, after)))

    def known(self, weights: Sequence[Weight]) -> dict[str, State] | None:
        """What was decided elsewhere, by name; None where that is still to be done. Raises InputError."""
        return None

    def table_digest(self) -> str:
        """The digest of where `known` has it from, or empty."""
        return ""

    def sense(self, offer: Offer, value: torch.Tensor, gradient: torch.Tensor) -> tuple[float, ...]:
        """What each state would cost; the weight in its dtype and its gradient fp32 come as [experts?, rows, columns]."""
        raise TypeError(f"{type(self).__name__} senses nothing")

    def look(self, offer: Offer, value: torch.Tensor) -> tuple[float, ...]:
        """What it asks of a weight [experts?, rows, columns] where it needs no gradients; stands in the place of costs."""
        raise TypeError(f"{type(self).__name__} does not look at weights")

    def decide(self, offers: Sequence[Offer], rest: Rest) -> dict[str, State]:
        """What every weight becomes; without costs, whether anything fits. Raises UsageError where nothing does."""
        raise TypeError(f"{type(self).__name__} decides nothing")

    def work(self) -> Line | None:
        """The pass that then does it, whatever its own scheme is; None where that is this one."""
        raise TypeError(f"{type(self).__name__} leaves it to nobody")


def decides(pass_: Pass) -> TypeGuard[AllocationPass]:
    """Whether what weights become shows only once the pass has decided."""
    return isinstance(pass_, AllocationPass) and pass_.decides


def rows_of(table: Path) -> list[dict[str, Any]]:
    """The lines of a table. Raises InputError for what is none."""
    try:
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            State.parse(row["state"])
            assert isinstance(row["weight"], str)
    except OSError as error:
        raise InputError(str(table), "a table of an allocation", error.strerror or str(error), _DO) from None
    except (ValueError, KeyError, TypeError, AssertionError, UnicodeDecodeError):
        raise InputError(str(table), "a weight and its state in every line", "something else", _DO) from None
    return rows


def read_table(table: Path) -> dict[str, State]:
    """What a table says of each weight. Raises InputError."""
    return {row["weight"]: State.parse(row["state"]) for row in rows_of(table)}


def offers_of(step: StepPlan, weights: Sequence[Weight]) -> tuple[list[Offer], Rest]:
    """What a step has to decide on, and what there is besides."""
    assert isinstance(step.pass_, AllocationPass)
    touched = set(step.transformed)
    others = [weight for weight in weights if weight.name not in touched]
    nbytes = sum(spec.nbytes for weight in others for spec in step.specs(weight))
    offers = [Offer(w, step.pass_.offers(w, step.before[w.name])) for w in weights if w.name in touched]
    overhead = step.disk_bytes - step.payload_bytes
    for weight, states in ((offer.weight, offer.states) for offer in offers):
        # A state with more tensors than the planned one has longer headers, though it may be smaller.
        more = max(len(specs(weight, state)) for state in states) - len(step.specs(weight))
        overhead += more * (2 * len(weight.name) + _ENTRY_BYTES)
    return offers, Rest(sum(weight.numel for weight in others), nbytes, overhead)
