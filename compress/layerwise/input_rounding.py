"""Input rounding: a model of dense weights whose inputs are rounded as told."""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from torch import nn

from compress.layerwise.stepwise import ROUNDING
from compress.numerics.inputs import InputRounding

if TYPE_CHECKING:
    from compress.layerwise.dense_view import DenseView
    from compress.layerwise.meta_model import MetaModel


def round_as_told(meta_model: MetaModel, under: str = "") -> MetaModel:
    """Makes a model round the inputs of weights in codes, of modules whose path begins so, as they say; returns it.

    Not for a model whose modules hold codes, which round by themselves (architecture/qlinear.py).
    """
    for name, (weight, state) in meta_model.dense_view.weights.items():
        if state.scheme is not None and state.scheme.inputs and weight.module.startswith(under):
            told = _Told(meta_model.dense_view, name)
            for path in meta_model.readers(name):
                round_inputs(meta_model.module_at(path), told)
    return meta_model


def round_inputs(module: nn.Module, how: Any) -> None:
    """Makes a module round its inputs from now on; `how` is called with them."""
    module.register_forward_pre_hook(partial(_rounded, how))
    # For a forward that has paused at this module, and calls no hook that came later (stepwise.py).
    vars(module)[ROUNDING] = how


class _Told:
    """The rounding of one weight's inputs; what is stored beside codes is read when it is needed first."""

    def __init__(self, dense_view: DenseView, name: str) -> None:
        self.dense_view, self.name = dense_view, name

    @cached_property
    def how(self) -> InputRounding:
        scheme = self.dense_view.weights[self.name][1].scheme
        assert scheme is not None
        if not (scheme.input_divisor or self.dense_view.weights[self.name][1].columns):
            return InputRounding(scheme)
        q = self.dense_view.qtensor(self.name)
        assert q is not None
        return InputRounding.of(q)

    def __call__(self, x: Any) -> Any:
        return self.how(x)


def _rounded(how: Any, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (how(inputs[0]), *inputs[1:])
