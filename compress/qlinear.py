"""QLinear: a module whose weight is codes, expanded whenever it is used.

The module keeps its class (Linear, Conv1D, Embedding), so that transformers' code that asks for it still finds it;
its `weight` becomes a property that QTensor.dequantize computes. Codes are frozen. Scales can be trained: by a `gain` of
each, one at first, so that a step of the optimizer is a share of the scale, whatever its size.

Legend of the gradient: w = s (c - z) for the columns of a group, so dL/ds is the sum of dL/dw (c - z) over them. Roundings,
of the scale and of w to the stored dtype, pass gradients on as they are (straight-through).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from compress.qtensor import QTensor


class QLinear(nn.Module):
    """Mixed into a module's class by `with_codes`. Buffers: codes uint8 [rows, columns] and zero; parameters: scale, gain."""

    codes: torch.Tensor
    scale: nn.Parameter
    zero: torch.Tensor | None
    gain: nn.Parameter | None
    scheme: Any
    stored_dtype: torch.dtype
    compute_dtype: torch.dtype

    def expand(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The weight [rows, columns], or some of its rows, rounded to the stored dtype as readers do."""
        parts = [self.codes, self.current_scale(), self.zero]
        if rows is not None:
            parts = [None if part is None else part[rows] for part in parts]
        dense: torch.Tensor = _Expanded.apply(*parts, self.scheme, self.stored_dtype, self.compute_dtype)  # type: ignore[no-untyped-call]
        return dense

    def current_scale(self) -> torch.Tensor:
        """The scale with its gain, on the stored dtype's grid."""
        if self.gain is None:
            return self.scale
        rounded: torch.Tensor = _Rounded.apply(self.scale * self.gain, self.stored_dtype)  # type: ignore[no-untyped-call]
        return rounded

    def learn(self) -> nn.Parameter:
        """Makes the scale trainable; returns its gain, of the scale's shape."""
        self.gain = nn.Parameter(torch.ones_like(self.scale, dtype=torch.float32))
        return self.gain

    @property
    def weight(self) -> torch.Tensor:
        return self.expand()


class QEmbedding(QLinear):
    """Looks rows up before it expands them. A `padding_idx` matters to gradients only."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.expand(ids.reshape(-1)).reshape(*ids.shape, -1)


def with_codes(module: nn.Module, q: QTensor, stored_dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
    """Puts codes in the place of `module.weight`, or makes a bare QLinear what they mean."""
    if not isinstance(module, QLinear):
        cls: Any = type(module)
        plain_lookup = isinstance(module, nn.Embedding) and cls.forward is nn.Embedding.forward and module.max_norm is None
        mixin = QEmbedding if plain_lookup else QLinear
        del module._parameters["weight"]
        module.__class__ = type(f"Q{cls.__name__}", (mixin, cls), {})
    module.register_buffer("codes", q.codes)
    module.register_buffer("zero", q.zero)
    module.register_parameter("scale", nn.Parameter(q.scale, requires_grad=False))
    module.register_parameter("gain", None)
    for name, value in (("scheme", q.scheme), ("stored_dtype", stored_dtype), ("compute_dtype", compute_dtype)):
        setattr(module, name, value)


class _Expanded(torch.autograd.Function):
    """Codes to weights, keeping nothing for the way back but the codes."""

    @staticmethod
    def forward(
        ctx: Any, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Any,
        stored: torch.dtype, compute: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        from compress.qtensor import QTensor

        ctx.save_for_backward(codes, zero)
        ctx.scheme, ctx.scale = scheme, (scale.shape, scale.dtype)
        return QTensor(scheme, codes, scale, zero).dequantize().to(stored).to(compute)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from compress.qtensor import QTensor

        codes, zero = ctx.saved_tensors
        shape, dtype = ctx.scale
        whole = codes.shape[-1]
        group = ctx.scheme.group or whole
        # What a scale of one would give: c - z.
        steps = QTensor(ctx.scheme, codes, torch.ones(shape, device=codes.device), zero).dequantize()
        product = steps.mul_(grads[0])
        if spare := -whole % group:
            product = nn.functional.pad(product, (0, spare))
        return None, product.unflatten(-1, (-1, group)).sum(-1).to(dtype), None, None, None, None


class _Rounded(torch.autograd.Function):
    """To the grid of a dtype and back; the gradient goes through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None
