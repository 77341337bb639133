"""Cache pass: the shape of passes that add scales of keys and values.

It changes no weight. Scales are tensors of their own, beside the weights of their attention; executors/cache.py measures them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from compress.architecture.attention import SCALES, Attention
from compress.architecture.weight_map import Model
from compress.contract.pass_base import Executor, ExternalInputs, WeightPass
from compress.spec.weight_state import FLOATS, Note, State, Weight

if TYPE_CHECKING:
    import torch

Refused = list[tuple[str, str, str]]
"""(module, reason, what to do)."""
_LEAVE_OUT = "leave quantize.kv out: its reader keeps them in 16 bits"


class CachePass(WeightPass):
    """Adds the scales with which a reader rounds keys and values to FP8 as it keeps them."""

    rule: ClassVar[str] = ""
    """How a scale follows from the calibration tokens, for the manifest."""

    def executor(self) -> Executor:
        return "cache"

    def reads_tokens(self) -> bool:
        return True

    def external_inputs(self, found: ExternalInputs) -> dict[str, str]:
        return {"tokens": found.tokens, "dtype": found.dtype}

    def how_to_use_less_memory(self) -> str:
        return "calibrate on fewer tokens"

    def chosen(self, weights: Sequence[Weight]) -> list[Weight]:
        return scales_of(weights)

    def becomes(self, weight: Weight, state: State) -> State:
        return state

    @abstractmethod
    def shape(self, attention: Attention) -> tuple[int, ...]:
        """The shape of each of a module's two scales."""

    @abstractmethod
    def scale(self, peaks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A scale of that shape, from the largest magnitude of each head, fp32 [heads]."""

    def added(self, model: Model) -> dict[str, list[Weight]]:
        """The scales that it adds, by the name of the weight on disk that they follow. For a model that `refused` takes."""
        found: dict[str, list[Weight]] = {}
        for attention in model.attentions:
            *_, last = own = _own(model, attention)
            prefix, dtype = _prefix(last), last.dtype if last.dtype in FLOATS else "F32"
            stack, block, shape = own[0].stack, own[0].block, self.shape(attention)
            found[last.name] = [
                Weight(f"{prefix}.{name}", dtype, shape, "cache", attention.path, name, "", stack, block) for name in SCALES
            ]
        return found

    def cache_notes(self, model: Model) -> list[Note]:
        """Counted lines about what is kept in fewer bits, and what is not kept at all."""
        kept = {(weight.stack, weight.block) for one in model.attentions for weight in _own(model, one)}
        places = {(w.stack, w.block): None for w in model.weights if w.block is not None}
        names = tuple(weight.name for scales in self.added(model).values() for weight in scales)
        values = sum(2 * one.heads * one.width for one in model.attentions)
        told = f"keys and values in FP8, {self.rule}; a token takes {values:,} bytes of cache instead of {2 * values:,}"
        stacks = {stack for stack, _ in kept}
        without = tuple(f"{stack} block {block}" for stack, block in places if stack in stacks and (stack, block) not in kept)
        lacking = "nothing to round: linear attention, a state space, or the keys and values of another layer"
        return [Note("kv cache", told, names), *([Note("no kv cache", lacking, without)] if without else [])]


def scales_of(weights: Sequence[Weight]) -> list[Weight]:
    """The scales of keys and values among tensors."""
    return [weight for weight in weights if weight.kind == "cache"]


def refused(model: Model) -> Refused:
    """Why no scales can be added to a model; empty where they can."""
    if not model.attentions:
        return [(model.family, "no layer of it keeps keys and values", "leave quantize.kv out")]
    found = [(one.path, one.unfit, _LEAVE_OUT) for one in model.attentions if one.unfit]
    for one in model.attentions if not found else ():
        own = _own(model, one)
        if len({_prefix(weight) for weight in own}) != 1:
            found.append((one.path, "its weights have no name in common on disk, under which scales could stand", _LEAVE_OUT))
    return found


def _own(model: Model, attention: Attention) -> list[Weight]:
    """The linears of a module that keeps keys and values."""
    return [w for w in model.weights if w.module.startswith(f"{attention.path}.") and w.kind == "linear"]


def _prefix(weight: Weight) -> str:
    """The name on disk of the module that holds a linear."""
    return weight.name.rpartition(".")[0].rpartition(".")[0]
