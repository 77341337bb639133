"""Meaning: a checkpoint in any state, seen as the dense weights it means.

Dense, masked, canonical codes or packed: `logical` names the same weights, and `dense` reads one of them. Codes are
expanded by QTensor.dequantize, the one meaning they have, and rounded to the dtype of the weight they were made
from, as readers do.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from compress import names, qtensor
from compress.checkpoint import CANONICAL, Checkpoint, Logical, torch_dtype
from compress.errors import InputError
from compress.facts import State, TensorSpec, Weight

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.contract import Format
    from compress.qtensor import QTensor


class Meaning:
    """Raises InputError for a checkpoint that another tool has quantized."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        manifest = checkpoint.manifest
        quantization = checkpoint.config.get("quantization_config") or {}
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        if quantization and (manifest is None or method not in (CANONICAL, manifest.format)):
            got = f"one quantized by {method}"
            raise InputError(str(checkpoint.path), "a checkpoint that compress made, or a dense one", got)
        self.format: Format | None = None
        if manifest is not None and manifest.format != "canonical":
            from compress.kernels.dispatch import load_format

            self.format = load_format(manifest.format)()

    @cached_property
    def weights(self) -> dict[str, tuple[Weight, State]]:
        """Every weight whose bytes are codes: its shape as passes see it, and its state."""
        records = self.checkpoint.manifest.weights if self.checkpoint.manifest else {}
        states = {name: State.parse(record.state) for name, record in records.items()}
        return {
            name: (Weight(name, r.dtype, r.shape, transposed=r.transposed, module=name.rpartition(".")[0]), states[name])
            for name, r in records.items()
            if states[name].scheme is not None
        }

    @cached_property
    def logical(self) -> dict[str, Logical]:
        """Every weight by its source name, in whatever form its bytes are."""
        if self.format is None:
            return self.checkpoint.logical
        held = {spec.name for name in self.weights for spec in self.specs(name)}
        found = {n: Logical(w.dtype, w.shape, state, w.transposed) for n, (w, state) in self.weights.items()}
        for ref in self.checkpoint.refs.values():
            if ref.name not in held:
                found[ref.name] = Logical(ref.dtype, ref.shape, State(), False)
        return found

    def specs(self, name: str) -> list[TensorSpec]:
        """The tensors on disk that hold a weight in codes."""
        weight, state = self.weights[name]
        return self.format.specs(weight, state) if self.format else qtensor.specs(weight, state)

    def qtensor(self, name: str) -> QTensor | None:
        """The codes of a weight, None where it is a plain tensor."""
        if name not in self.weights:
            return None
        weight, state = self.weights[name]
        parts = {spec.name: self.checkpoint.read(spec.name) for spec in self.specs(name)}
        return self.format.decode(weight, state, parts) if self.format else qtensor.decode(weight, state, parts)

    def dense(self, name: str) -> torch.Tensor:
        """The weight in its stored shape and dtype."""
        q = self.qtensor(name)
        if q is None:
            return self.checkpoint.read(name)
        weight, _ = self.weights[name]
        return qtensor.as_matrix(weight, q.dequantize()).to(torch_dtype(weight.dtype)).contiguous()

    def resolve(self, model: nn.Module) -> names.Model:
        """The place of every weight in `model`. Raises InputError with everything that does not fit."""
        return names.place(self.checkpoint, self.logical, model, allow_dtype_mismatch=True)
