"""Dense view: reads a checkpoint in any state as dense weights.

Whether weights are dense, masked, canonical codes, or packed by us or by another tool: `logical` has the same names, and
`dense` reads one weight. Codes are expanded by QTensor.dequantize, which defines their values, and rounded to the dtype of
the weight that they were made from, as readers do.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from compress.architecture import weight_map
from compress.checkpoint.reader import CANONICAL, NATIVE, Checkpoint, Logical, torch_dtype
from compress.errors import InputError
from compress.importers import Foreign, method_of, open_foreign
from compress.numerics import qtensor
from compress.spec.weight_state import State, TensorSpec, Weight

if TYPE_CHECKING:
    from torch import nn

    from compress.contract.format import Format
    from compress.numerics.qtensor import QTensor
    from compress.spec.scheme import Scheme


class DenseView:
    """Raises InputError for a packed checkpoint that cannot be read.

    Some readers multiply by unrounded dequantized values: with `rounded` False weights are these, in fp32 whatever is stored.
    """

    def __init__(self, checkpoint: Checkpoint, rounded: bool = True) -> None:
        self.checkpoint, self.rounded = checkpoint, rounded
        manifest, method = checkpoint.manifest, method_of(checkpoint)
        self.format: Format | None = None
        self.foreign: Foreign | None = None
        self._told = manifest is not None and manifest.format not in ("canonical", "tokens") and method == manifest.format
        if self._told or method == NATIVE:
            from compress.kernels.dispatch import load_format

            self.format = load_format(str(method))().reading(checkpoint)
        if self.format is not None and (self.format.expands or self.format.renames):
            self.format, self.foreign = None, open_foreign(checkpoint)
        elif self.format is None and method is not None and not (manifest is not None and method == CANONICAL):
            self.foreign = open_foreign(checkpoint)

    @property
    def packed(self) -> bool:
        """Whether weights are in a format for readers, not in the canonical form."""
        return self.format is not None or self.foreign is not None

    @cached_property
    def weights(self) -> dict[str, tuple[Weight, State]]:
        """Every weight that is packed or in codes, with its state; shapes are those of the dense weight."""
        if self.foreign is not None:
            return {
                p.name: (
                    Weight(p.name, p.dtype, p.shape, transposed=p.transposed, module=p.name.rpartition(".")[0]),
                    self._state(p.name, p.scheme),
                )
                for p in self.foreign.weights.values()
                if p.scheme is not None
            }
        if self.format is not None and not self._told:
            return self._checked(self.format.described(self.checkpoint))
        known = {
            name: (Weight(name, r.dtype, r.shape, transposed=r.transposed, module=name.rpartition(".")[0]), self._states[name])
            for name, r in (self.checkpoint.manifest.weights if self.checkpoint.manifest else {}).items()
        }
        plain = self.format.plain if self.format else lambda _, state: state.scheme is None
        there = self.checkpoint.refs
        return self._checked({name: entry for name, entry in known.items() if name not in there or not plain(*entry)})

    def _checked(self, weights: dict[str, tuple[Weight, State]]) -> dict[str, tuple[Weight, State]]:
        """Returns `weights`. Raises InputError if their tensors are missing or differ."""
        if self.format is None:
            return weights
        for spec, state in [(spec, entry[1]) for entry in weights.values() for spec in self.format.specs(*entry)]:
            ref = self.checkpoint.refs.get(spec.name)
            if ref is None or (ref.dtype, ref.shape) != (spec.dtype, spec.shape):
                got = f"{ref.dtype} {list(ref.shape)}" if ref else "no such tensor"
                expected = f"{spec.dtype} {list(spec.shape)} of {state}"
                raise InputError(f"'{spec.name}' in {self.checkpoint.path}", expected, got, "make the artifact anew")
        return weights

    @cached_property
    def _states(self) -> dict[str, State]:
        """The states in our manifest."""
        manifest = self.checkpoint.manifest
        return {name: State.parse(record.state) for name, record in manifest.weights.items()} if manifest else {}

    def _state(self, name: str, scheme: Scheme | None) -> State:
        """The state of a weight that is read like another tool's: in an artifact of ours it keeps its zeros."""
        own = self._states.get(name, State(scheme))
        return own if own.scheme == scheme else State(scheme)

    @cached_property
    def logical(self) -> dict[str, Logical]:
        """Every weight by its source name, in whatever form its bytes are, in stored order."""
        if not self.packed:
            return self.checkpoint.logical
        if self.foreign is not None:
            owners = {part: packed.name for packed in self.foreign.weights.values() for part in packed.parts}
            # Further tensors of a format, such as scales of activations, are not weights.
            dropped = self.foreign.parts - owners.keys()
        else:
            owners, dropped = {spec.name: name for name in self.weights for spec in self.specs(name)}, frozenset()
        found: dict[str, Logical] = {}
        for ref in self.checkpoint.refs.values():
            name = owners.get(ref.name, ref.name)
            if name in self.weights:
                weight, state = self.weights[name]
                found[name] = Logical(weight.dtype, weight.shape, state, weight.transposed)
            elif self.foreign is not None and name in self.foreign.weights:
                packed = self.foreign.weights[name]
                found[name] = Logical(packed.dtype, packed.shape, self._state(name, None), False)
            elif name not in dropped:
                found[name] = Logical(ref.dtype, ref.shape, self._states.get(name, State()), False)
        return found

    def is_packed(self, name: str) -> bool:
        """Whether a weight is stored as something else than a plain tensor."""
        return name in self.weights or (self.foreign is not None and name in self.foreign.weights)

    def specs(self, name: str) -> list[TensorSpec]:
        """The tensors on disk that hold a weight that is packed or in codes."""
        weight, state = self.weights[name]
        return self.format.specs(weight, state) if self.format else qtensor.specs(weight, state)

    def qtensor(self, name: str) -> QTensor | None:
        """The codes of a weight, None if it has none."""
        if name not in self.weights or self.weights[name][1].scheme is None:
            return None
        if self.foreign is not None:
            found = self.foreign.weights[name].read(self.checkpoint.read)
            assert not isinstance(found, torch.Tensor)
            return found
        found = self._decoded(name)
        assert not isinstance(found, torch.Tensor)
        return found

    def _decoded(self, name: str) -> QTensor | torch.Tensor:
        weight, state = self.weights[name]
        parts = {spec.name: self.checkpoint.read(spec.name) for spec in self.specs(name)}
        return self.format.decode(weight, state, parts) if self.format else qtensor.decode(weight, state, parts)

    def dense(self, name: str) -> torch.Tensor:
        """The weight in its stored shape and dtype."""
        q = self.qtensor(name)
        if q is None:
            if self.foreign is not None and name in self.foreign.weights:
                found = self.foreign.weights[name].read(self.checkpoint.read)
                assert isinstance(found, torch.Tensor)
                return found.to(torch_dtype(self.foreign.weights[name].dtype)) if self.rounded else found
            if name not in self.weights:
                return self.checkpoint.read(name)
            values = self._decoded(name)
            assert isinstance(values, torch.Tensor)
            return qtensor.as_matrix(self.weights[name][0], values).contiguous()
        weight, _ = self.weights[name]
        return qtensor.as_matrix(weight, q.dequantize()).to(self.dtype_of(weight)).contiguous()

    def dtype_of(self, weight: Weight) -> torch.dtype:
        """The dtype that an expanded weight is rounded to."""
        return torch_dtype(weight.dtype) if self.rounded else torch.float32

    def resolve(self, model: nn.Module) -> weight_map.Model:
        """Places every weight in `model`. Raises InputError with everything that does not fit."""
        return weight_map.place(self.checkpoint, self.logical, model, allow_dtype_mismatch=True)
