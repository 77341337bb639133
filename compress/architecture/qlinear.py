"""QLinear: a module whose weight is codes, expanded whenever it is used.

The module keeps its class (Linear, Conv1D, Embedding), so that `isinstance` checks in transformers still hold;
its `weight` becomes a property that QTensor.dequantize computes. Codes and outliers are frozen. Scales can be trained: each
is multiplied by a `gain`, 1 at first, so that a step of the optimizer changes a scale by a share of its size. Low-rank factors
are fp32 and can be trained, unless they are stored in int8. Their product is added to the expanded codes, which costs
little beside the expansion, whether a module multiplies by its weight or looks rows up in it.

If the scheme rounds activations, the module's inputs are rounded, as readers do while a model runs (numerics/inputs.py).

Gradient: w = s v with v = c - z, or a value of the grid, for the weights that share a scale, so dL/ds is the sum of
dL/dw v over them. With a minimum w = s c + m, v = c, and m stays as it is. Roundings (of the scale, of w to the stored dtype,
of activations) pass gradients on unchanged (straight-through).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compress.numerics.columns import KeptColumns
from compress.numerics.input_rotation import rotated
from compress.numerics.inputs import InputRounding
from compress.numerics.lowrank import Factors
from compress.numerics.outliers import Sparse
from compress.numerics.qtensor import QTensor
from compress.numerics.scales import blocked


class QLinear(nn.Module):
    """Mixed into a module's class by `with_codes`. Buffers: codes uint8 [rows, columns], zero, minimum, outliers by rows as in
    Sparse, kept columns as in KeptColumns; parameters: scale, gain; left, right and rank_scale as in Factors, buffers until they
    are trained.

    A scale whose dtype is not the compute dtype is a buffer too, because transformers takes a model's dtype from its parameters.
    """

    codes: torch.Tensor
    scale: nn.Parameter
    zero: torch.Tensor | None
    minimum: torch.Tensor | None
    gain: nn.Parameter | None
    outlier_values: torch.Tensor | None
    outlier_columns: torch.Tensor | None
    outlier_offsets: torch.Tensor | None
    left: torch.Tensor | None
    right: torch.Tensor | None
    rank_scale: torch.Tensor | None
    input_scale: torch.Tensor | None
    kept_columns: torch.Tensor | None
    kept_values: torch.Tensor | None
    kept_scale: torch.Tensor | None
    scheme: Any
    stored_dtype: torch.dtype
    compute_dtype: torch.dtype

    def expand(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The weight [rows, columns], or some of its rows, rounded to the stored dtype as readers do."""
        parts = [self.codes, self.current_scale(), self.zero, self.minimum]
        outliers, kept, factors = self.outliers(), self.kept(), self.factors()
        if rows is not None and self.scheme.scales in ("tensor", "block"):
            return self.expand()[rows]
        if rows is not None:
            parts = [None if part is None else part[rows] for part in parts]
            outliers = None if outliers is None else outliers.take(rows)
            kept = None if kept is None else kept.take(rows)
            factors = None if factors is None else replace(factors, left=factors.left[rows])
        dtypes = (self.stored_dtype, self.compute_dtype) if self.rounded_at_once(factors) else (torch.float32, torch.float32)
        dense: torch.Tensor = _Expanded.apply(*parts, self.scheme, outliers, *dtypes)  # type: ignore[no-untyped-call]
        # Codes of kept columns mean zero, so that no scale has a gradient from them.
        dense = dense if kept is None else kept.put(dense)
        return dense if self.rounded_at_once(factors) else self.completed(dense, factors)

    def rounded_at_once(self, factors: Factors | None) -> bool:
        """Whether what codes mean is the weight itself, so that nothing is computed of it before it is rounded."""
        return factors is None and not self.scheme.hadamard

    def completed(self, dense: torch.Tensor, factors: Factors | None) -> torch.Tensor:
        """What codes mean, fp32 and not yet rounded, rotated as inputs are, with the product of low-rank factors, rounded."""
        with torch.autocast(dense.device.type, enabled=False):
            dense = rotated(dense, self.scheme.hadamard)
            dense = dense if factors is None else dense + factors.product()
            rounded: torch.Tensor = _Rounded.apply(dense, self.stored_dtype)  # type: ignore[no-untyped-call]
            return rounded.to(self.compute_dtype)

    def outliers(self) -> Sparse | None:
        """The values that replace some of the codes."""
        if self.outlier_values is None:
            return None
        assert self.outlier_columns is not None
        assert self.outlier_offsets is not None
        return Sparse(self.outlier_values, self.outlier_columns, self.outlier_offsets)

    def kept(self) -> KeptColumns | None:
        """The columns that are kept beside the codes."""
        if self.kept_columns is None:
            return None
        assert self.kept_values is not None
        return KeptColumns(self.kept_columns, self.kept_values, self.kept_scale)

    def factors(self) -> Factors | None:
        """The low-rank factors whose product is added to the expanded codes."""
        if self.left is None:
            return None
        assert self.right is not None
        return Factors(self.left, self.right, self.rank_scale)

    def quantized(self) -> QTensor:
        """The QTensor that this module was made from, with the current factors and the original scale."""
        q = QTensor(self.scheme, self.codes, self.scale, self.zero, None, self.outliers(), self.factors(), self.minimum)
        return replace(q, input_scale=self.input_scale, kept=self.kept())

    def current_scale(self) -> torch.Tensor:
        """The scale with its gain, on the stored dtype's grid."""
        if self.gain is None:
            return self.scale
        rounded: torch.Tensor = _Rounded.apply(self.scale * self.gain, self.stored_dtype)  # type: ignore[no-untyped-call]
        return rounded

    def learn(self) -> dict[str, nn.Parameter]:
        """Makes the scale and the factors trainable; returns parameters by name: a gain of the scale's shape, left, right."""
        found = self.gains()
        if self.left is not None and self.rank_scale is None:
            found |= {name: nn.Parameter(self.get_buffer(name)) for name in ("left", "right")}
        for name, parameter in found.items():
            self._buffers.pop(name, None)
            self.register_parameter(name, parameter)
        return found

    def gains(self) -> dict[str, nn.Parameter]:
        """A gain of 1 for each scale, by its name; none where scales cannot be moved."""
        return {} if self.scheme.powers else {"gain": nn.Parameter(torch.ones_like(self.scale, dtype=torch.float32))}

    @property
    def weight(self) -> torch.Tensor:
        return self.expand()


class QRounding(QLinear):
    """A QLinear that rounds its inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        how = InputRounding(self.scheme, self.input_scale, self.kept_columns, self.kept_scale is not None)
        rounded: torch.Tensor = RoundedInputs.apply(x, how)  # type: ignore[no-untyped-call]
        out: torch.Tensor = super().forward(rounded)
        return out


class QEmbedding(QLinear):
    """An embedding that expands only the rows it looks up. A `padding_idx` matters to gradients only."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.expand(ids.reshape(-1)).reshape(*ids.shape, -1)


def with_codes(module: nn.Module, q: QTensor, stored_dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
    """Replaces `module.weight` by codes, or fills a bare QLinear with them."""
    if not isinstance(module, QLinear):
        cls: Any = type(module)
        plain_lookup = isinstance(module, nn.Embedding) and cls.forward is nn.Embedding.forward and module.max_norm is None
        mixin = QEmbedding if plain_lookup else QRounding if q.scheme.inputs else QLinear
        del module._parameters["weight"]
        module.__class__ = type(f"Q{cls.__name__}", (mixin, cls), {})
    module.register_buffer("codes", q.codes)
    module.register_buffer("zero", q.zero)
    module.register_buffer("minimum", q.minimum)
    module.register_buffer("input_scale", q.input_scale)
    if q.scale.dtype == compute_dtype:
        module.register_parameter("scale", nn.Parameter(q.scale, requires_grad=False))
    else:
        module.register_buffer("scale", q.scale)
    module.register_parameter("gain", None)
    for name in ("values", "columns", "offsets"):
        module.register_buffer(f"outlier_{name}", getattr(q.outliers, name, None))
    for name in ("columns", "values", "scale"):
        module.register_buffer(f"kept_{name}", getattr(q.kept, name, None))
    factors = q.lowrank
    if factors is not None and factors.scale is None:
        factors = Factors(*factors.halves())
    for name, part in (("left", "left"), ("right", "right"), ("rank_scale", "scale")):
        module.register_buffer(name, getattr(factors, part, None))
    for name, value in (("scheme", q.scheme), ("stored_dtype", stored_dtype), ("compute_dtype", compute_dtype)):
        setattr(module, name, value)


class _Expanded(torch.autograd.Function):
    """Expands codes to weights, not yet rotated; keeps nothing but the codes for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, minimum: torch.Tensor | None,
        scheme: Any, outliers: Sparse | None, stored: torch.dtype, compute: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(codes, zero)
        ctx.scheme, ctx.scale, ctx.outliers = scheme, (scale.shape, scale.dtype), outliers
        dense = QTensor(scheme, codes, scale, zero, minimum=minimum).values()
        dense = dense if outliers is None else outliers.put(dense)
        return dense.to(stored).to(compute)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, zero = ctx.saved_tensors
        shape, dtype = ctx.scale
        # v: the weights at a scale of one, without minima.
        ones = torch.ones(shape, device=codes.device)
        none = torch.zeros_like(ones) if ctx.scheme.minimum else None
        steps = QTensor(ctx.scheme, codes, ones, zero, minimum=none).values()
        if ctx.outliers is not None:
            steps = ctx.outliers.clear(steps)
        product = blocked(steps.mul_(grads[0]), ctx.scheme)
        return None, product.sum(-1).sum(-2).to(dtype), None, None, None, None, None, None


class RoundedInputs(torch.autograd.Function):
    """Activations rounded as a weight says; the gradient goes through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, how: InputRounding) -> torch.Tensor:
        return how(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class _Rounded(torch.autograd.Function):
    """To the grid of a dtype and back; the gradient goes through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None
