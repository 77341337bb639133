"""Rotate: spreads outliers over all channels; outputs do not change.

The residual stream and values are rotated by matrices that mix all channels, so that none stands out: weights lose the heavy
tails that stretch the steps of a row, and activations the outliers that 4 bits have no room for. It is what folds into weights
of QuaRot (Ashkboos et al., 2404.00456) and SpinQuant (Liu et al., 2405.16406), so that the result is an ordinary checkpoint:

    R1  the residual stream. Gains of norms go into what reads them first, and ones are left in the norms
    R2  the values of each head, undone in the output projection

Neither needs data: the rotations are random by the seed, not learned, and there are none at run time (QuaRot's inside of the
MLP, of queries and keys). Of tied embeddings only the head takes the last norm's gain, so R1 needs `untie`. Weights are computed
in float64 and rounded once to their dtype: in bf16 the function changes by that. Families with LayerNorm, or with norms of what
is added to the stream, are refused by name; compress/architecture/rotations.py has the table.

Put it first, and try it: it helps a model whose channels differ, where a scale covers many of them (per channel, or of
activations); one without outliers only loses a little. recipes/rotations.md has what was measured.
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator

from compress.contract.rotating_pass import RotatingPass


class Rotate(RotatingPass):
    """Spreads outliers over all channels, and changes nothing else."""

    example: ClassVar[str] = "quantize.rotate"

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.r1 or self.r2):
            raise ValueError("r1, r2: at least one of them")
        if self.untie and not self.r1:
            raise ValueError("untie: only with r1")
        return self
