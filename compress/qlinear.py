"""QLinear: a module whose weight is codes, expanded whenever it is used.

The module keeps its class (Linear, Conv1D, Embedding), so that transformers' code that asks for it still finds it;
its `weight` becomes a property that QTensor.dequantize computes. Codes are frozen; scales are parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from compress.qtensor import QTensor


class QLinear(nn.Module):
    """Mixed into a module's class by `with_codes`. Buffers: codes uint8 [rows, columns] and zero; parameter: scale."""

    codes: torch.Tensor
    scale: nn.Parameter
    zero: torch.Tensor | None
    scheme: Any
    stored_dtype: torch.dtype
    compute_dtype: torch.dtype

    def expand(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The weight [rows, columns], or some of its rows, rounded to the stored dtype as readers do."""
        from compress.qtensor import QTensor

        parts = [self.codes, self.scale, self.zero]
        if rows is not None:
            parts = [None if part is None else part[rows] for part in parts]
        codes, scale, zero = parts
        assert codes is not None
        assert scale is not None
        return QTensor(self.scheme, codes, scale, zero).dequantize().to(self.stored_dtype).to(self.compute_dtype)

    @property
    def weight(self) -> torch.Tensor:
        return self.expand()


class QEmbedding(QLinear):
    """Looks rows up before it expands them. A `padding_idx` matters to gradients only."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.expand(ids.reshape(-1)).reshape(*ids.shape, -1)


def with_codes(module: nn.Module, q: QTensor, stored_dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
    """Puts codes in the place of `module.weight`."""
    cls: Any = type(module)
    plain_lookup = isinstance(module, nn.Embedding) and cls.forward is nn.Embedding.forward and module.max_norm is None
    mixin = QEmbedding if plain_lookup else QLinear
    del module._parameters["weight"]
    module.__class__ = type(f"Q{cls.__name__}", (mixin, cls), {})
    module.register_buffer("codes", q.codes)
    module.register_buffer("zero", q.zero)
    module.register_parameter("scale", nn.Parameter(q.scale, requires_grad=False))
    for name, value in (("scheme", q.scheme), ("stored_dtype", stored_dtype), ("compute_dtype", compute_dtype)):
        setattr(module, name, value)
