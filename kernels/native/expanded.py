"""Expanded: the dequantized weight that other code gets from a packed module."""

from __future__ import annotations

import torch

from compress.errors import UsageError


class Expanded(torch.Tensor):
    """A dequantized packed weight. Assigning to its `data` raises UsageError: it would be lost."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> torch.Tensor:
        return super().data

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        do = "keep the adapter beside it, or merge it into the dense model that `compress unpack --to dense` writes"
        raise UsageError("weight.data of a packed weight", "a weight that is read", "other values for it", do)


def expanded(dense: torch.Tensor) -> torch.Tensor:
    """A dequantized weight as such; compiled code never assigns to weights, so there it stays a plain tensor."""
    return dense if torch.compiler.is_compiling() else dense.as_subclass(Expanded)
