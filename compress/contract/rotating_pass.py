"""Rotating pass: rotates channels and keeps the function of the model.

Which tensors change, and how, follows from the family alone (architecture/rotations.py); no data is needed. Its executor is
executors/rotate.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import size_of
from compress.contract.pass_base import Executor, WeightPass
from compress.errors import InputError, Refusal
from compress.numerics.rotation import Kind, factors
from compress.spec.weight_state import FLOATS, State, Weight

PIECE_BYTES = 16 << 20
"""Bytes of a tensor, in float64, that are rotated at a time."""


class RotatingPass(WeightPass):
    """Rotates the residual stream and values."""

    r1: bool = Field(True, description="rotate the residual stream: all that reads or writes it")
    r2: bool = Field(True, description="rotate the values of each head, in each block by itself")
    kind: Kind = Field(
        "hadamard",
        description="Hadamard matrices with random signs, of the whole size (orthogonal where none is known) or in blocks of the "
        "largest power of two that divides it (block); or uniformly random ones (orthogonal)",
    )
    untie: bool = Field(
        False, description="give a head that is tied to the embeddings a matrix of its own, which R1 needs; plan shows its bytes"
    )

    def executor(self) -> Executor:
        return "rotate"

    def chosen(self, weights: Sequence[Weight]) -> list[Weight]:
        return [weight for weight in weights if weight.module]

    def becomes(self, weight: Weight, state: State) -> State:
        if state.scheme is not None:
            raise Refusal(f"it is already {state}, and codes cannot be rotated", "rotate before quantizing")
        if state.sparsity is not None:
            raise Refusal(f"it is {state}, and a rotation would fill its zeros", "rotate before pruning")
        if weight.dtype not in FLOATS:
            raise Refusal(f"{weight.dtype} is no dtype of weights", "quantize without rotating")
        return state

    def workspace_bytes(self, weight: Weight) -> int:
        return 5 * PIECE_BYTES

    def rotation_bytes(self, config: dict[str, Any]) -> int:
        """Memory of R1, which all workers share: where it is no Hadamard matrix, a dense one and its making."""
        n = size_of(config, "hidden_size") or 0
        return 4 * 8 * n**2 if self.r1 and n and factors(n, self.kind) is None else 0


def same_basis(student: Manifest | None, teacher: Manifest | None) -> None:
    """Raises InputError where hidden states of two models cannot be compared: the residual stream of one is rotated."""
    own, theirs = ([one for one, r1 in rotated_by(manifest).items() if r1] for manifest in (student, teacher))
    if own != theirs:
        do = "name the output of quantize.rotate, with nothing after it, as the teacher; or use distill.logits"
        raise InputError("teacher", "a residual stream that is rotated as the student's is", "another rotation, or none", do)


def rotated_by(manifest: Manifest | None) -> dict[str, bool]:
    """The steps of a lineage that have rotated: id -> whether the residual stream was."""
    lines = manifest.lineage if manifest is not None else ()
    return {line.id: bool(line.options.get("r1")) for line in lines if line.text.startswith("quantize.rotate")}
