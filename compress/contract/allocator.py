"""Allocator: decides states of weights by a budget, by values or by inputs."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from compress.checkpoint.reader import ALLOCATION
from compress.errors import InputError
from compress.numerics.qtensor import specs, stored_bytes
from compress.spec.weight_state import State, Weight, payload_bytes

if TYPE_CHECKING:
    import torch

    from compress.contract.step_plan import StepPlan
    from compress.contract.tasks import Statistic
    from compress.numerics.hessian import Hessian

_ENTRY_BYTES = 256
"""Most bytes that headers and index need for a tensor, besides its name."""
_DO = f"name the {ALLOCATION[0]} of a step that has decided"


@dataclass(frozen=True)
class Offer:
    """The states that a weight may take, and the allocator's cost of each."""

    weight: Weight
    states: tuple[State, ...]
    costs: tuple[float, ...] = ()


class Observed(NamedTuple):
    """One matrix [out, in] in its dtype, and what is prepared from its inputs."""

    value: torch.Tensor
    inputs: Any


@dataclass(frozen=True)
class Rest:
    """Sizes of everything in a checkpoint but the weights that are decided on."""

    numel: int
    nbytes: int
    """Bytes of its tensors."""
    overhead_bytes: int
    """Most bytes of headers, index and config.json of the whole checkpoint."""


class Allocator(ABC):
    """Decides the state of each weight before shards are laid out, by gradients of the loss, inputs, or the weights alone."""

    gradients: ClassVar[bool] = True
    """Whether `costs` needs gradients of the loss."""

    @property
    def squares(self) -> bool:
        """Whether `costs` gets sums over samples of the squares of gradients instead of the mean gradient."""
        return False

    def weighs_outputs(self, weights: Sequence[Weight]) -> bool:
        """Whether it is shown what these weights read and gradients by their outputs (`costs_by_both`), not by themselves."""
        return False

    def prepare_inputs(self, statistic: Hessian) -> Any:
        """What `costs_by_both` needs of the inputs that several weights read; once for these."""
        return statistic.mean()

    def costs_by_both(self, offer: Offer, value: torch.Tensor, inputs: Any, outputs: Sequence[torch.Tensor]) -> tuple[float, ...]:
        """What each offered state of a matrix [out, in] adds to the KL, in nats per token.

        `inputs` is what `prepare_inputs` returned, `outputs` are means over tokens of g g^T, g the gradient of a token's loss by
        the weight's outputs, for each segment of rows (numerics/output_feedback.py).
        """
        return ()

    @abstractmethod
    def offers(self, weight: Weight, state: State) -> tuple[State, ...]:
        """The states that a targeted weight may take. Raises Refusal with the reason. Reads no bytes."""

    def largest(self, weight: Weight, state: State) -> State:
        """The offered state with most bytes, which a plan assumes before the decision. Raises Refusal."""
        return max(self.offers(weight, state), key=lambda after: stored_bytes(weight, after))

    def known(self, weights: Sequence[Weight]) -> dict[str, State] | None:
        """States by name from an earlier decision; None if there is none. Raises InputError."""
        return None

    def table_digest(self) -> str:
        """The digest of the table that `known` reads; empty if there is none."""
        return ""

    @property
    def reads_gradients(self) -> bool:
        """Whether its decision needs a gradient sweep over calibration tokens."""
        return self.gradients and not self.table_digest()

    def costs(self, offer: Offer, value: torch.Tensor, gradient: torch.Tensor | None) -> tuple[float, ...]:
        """The numbers that `decide` needs for a weight; with gradients, the increase of the loss by each offered state.

        The weight comes in its dtype and its gradient, or the sum of squares, in fp32, both [experts?, rows, columns].
        """
        return ()

    @abstractmethod
    def decide(self, offers: Sequence[Offer], rest: Rest) -> dict[str, State]:
        """The state of every weight; without costs it only checks that some choice fits. Raises UsageError if none does."""


class InputAllocator(Allocator):
    """Decides by the inputs of weights, block by block, in one forward of the model as it is before the step."""

    gradients: ClassVar[bool] = False

    @property
    def route(self) -> Literal["router", "all"]:
        """The tokens that a routed expert is observed on."""
        return "router"

    def two_streams(self) -> bool:
        """Whether it is shown the inputs of another model, too: the one as it is before the step is all that it sees."""
        return False

    @abstractmethod
    def statistic(self, width: int) -> Statistic:
        """An empty statistic of inputs of that width."""

    @abstractmethod
    def statistic_bytes(self, width: int) -> int:
        """Memory of a statistic, including what `prepare` needs."""

    @abstractmethod
    def prepare(self, statistic: Any) -> Any:
        """Computes from a statistic what `cost` needs of it. Raises ValueError if an input was not finite."""

    @abstractmethod
    def cost(self, matrices: Callable[[], Iterable[Observed]]) -> float:
        """The number that `decide` needs for a block; `matrices` yields its targeted matrices, as often as it is called."""

    def workspace_bytes(self, weight: Weight) -> int:
        """Memory that the work on one weight needs besides it."""
        return 10 * weight.numel // (weight.experts or 1)


def rows_of(table: Path) -> list[dict[str, Any]]:
    """The rows of an allocation table. Raises InputError for a file that is no such table."""
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
    """The state of each weight in an allocation table. Raises InputError."""
    return {row["weight"]: State.parse(row["state"]) for row in rows_of(table)}


def offers_of(step: StepPlan, weights: Sequence[Weight]) -> tuple[list[Offer], Rest]:
    """The offers of a step's weights, and the sizes of everything else."""
    allocator = step.pass_.allocator()
    assert allocator is not None
    touched = set(step.transformed)
    others = [weight for weight in weights if weight.name not in touched]
    nbytes = payload_bytes(chain.from_iterable(map(step.specs, others)))
    offers = [Offer(w, allocator.offers(w, step.before[w.name])) for w in weights if w.name in touched]
    overhead = step.disk_bytes - step.payload_bytes
    # The most tensors of weights that are alike.
    most: dict[tuple[str, tuple[int, ...], tuple[State, ...]], int] = {}
    for weight, states in ((offer.weight, offer.states) for offer in offers):
        alike = weight.dtype, weight.shape, states
        if alike not in most:
            most[alike] = max(len(specs(weight, state)) for state in states)
        # A state with more tensors than the planned one has longer headers, even if its tensors are smaller.
        more = most[alike] - len(step.specs(weight))
        overhead += more * (2 * len(weight.name) + _ENTRY_BYTES)
    return offers, Rest(sum(weight.numel for weight in others), nbytes, overhead)
