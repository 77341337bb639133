"""Student: a checkpoint in any state as a model that can be trained.

What is trained has the shape that it has on disk, whatever transformers makes of it while it loads: a dense weight in fp32;
of a weight in codes the gain of each scale, and low-rank factors beside it in fp32. A parameter that transformers fuses or
splits becomes a property that is made of them, by transformers' own conversion, whenever it is used. So a step's result is
written down as it stands, experts and fused projections can be in codes, and a mask lies on the weight that it was made for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.architecture.hf_mapping import Group, Mapping
from compress.architecture.qlinear import QLinear, with_codes
from compress.checkpoint.reader import Checkpoint, torch_dtype
from compress.errors import InputError
from compress.layerwise.model import filled
from compress.numerics import qtensor
from compress.numerics.lowrank import Factors
from compress.spec.weight_state import FLOATS, Weight

if TYPE_CHECKING:
    from compress.layerwise.dense_view import DenseView

_PART = "source"
"""What a fused parameter is made of hangs on its module under this name and a number."""


@dataclass(frozen=True)
class Leaf:
    """One weight of the checkpoint inside the model: its parameter's path, or the path of its codes."""

    path: str
    codes: bool


class Student:
    """`module` is transformers' model in fp32, in eval mode: without dropout. Raises InputError."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        meta_model = filled(checkpoint, "float32")
        self.module: Any = meta_model.module
        self.dense_view: DenseView = meta_model.dense_view
        self.leaves: dict[str, Leaf] = {}
        for group in meta_model.mapping.groups(self.dense_view.logical):
            name, (path, _, attribute) = group.sources[0], group.parameter.rpartition(".")
            owner = self.module.get_submodule(path)
            if isinstance(owner, QLinear) and attribute == "weight":
                self.leaves[name] = Leaf(path, True)
            elif not group.patterns and name not in self.dense_view.weights:
                self.leaves[name] = Leaf(group.parameter, False)
            else:
                self._fuse(meta_model.mapping, group)
        self.checkpoint = checkpoint
        self._learning: dict[str, nn.Parameter] = {}
        self._paths: dict[str, str] = {}

    def _fuse(self, mapping: Mapping, group: Group) -> None:
        """Makes properties of the parameters that a group becomes, and leaves of its sources."""
        made = mapping.convert(group, lambda name: torch.empty(self.dense_view.logical[name].shape, device="meta"))
        if any(self.dense_view.logical[name].dtype not in FLOATS for name in group.sources):
            return
        path = group.parameter.rpartition(".")[0]
        home: nn.Module = self.module.get_submodule(path)
        parts: list[tuple[Any, Weight | None]] = []
        for name in group.sources:
            part: nn.Module = QLinear() if name in self.dense_view.weights else nn.Module()
            key = f"{_PART}_{sum(key.startswith(_PART) for key in home._modules)}"
            if isinstance(part, QLinear):
                weight, _ = self.dense_view.weights[name]
                q = self.dense_view.qtensor(name)
                assert q is not None
                with_codes(part, q.plain(), torch_dtype(weight.dtype), torch.float32)
                self.leaves[name] = Leaf(f"{path}.{key}", True)
            else:
                part.weight = nn.Parameter(self.dense_view.dense(name).float(), requires_grad=False)
                self.leaves[name] = Leaf(f"{path}.{key}.weight", False)
            home.add_module(key, part)
            parts.append((part, self.dense_view.weights[name][0] if name in self.dense_view.weights else None))
        conversion = Conversion(mapping, group, [tuple(self.dense_view.logical[name].shape) for name in group.sources])

        def value(parameter: str) -> torch.Tensor:
            sources = [part.weight if weight is None else qtensor.as_matrix(weight, part.weight) for part, weight in parts]
            result: torch.Tensor = _Converted.apply(conversion, parameter, *sources)  # type: ignore[no-untyped-call]
            return result

        for parameter in made:
            owner = self.module.get_submodule(parameter.rpartition(".")[0])
            attribute = parameter.rpartition(".")[2]
            del owner._parameters[attribute]
            made_here = property(partial(_called, value, parameter))
            owner.__class__ = type(type(owner).__name__, (type(owner),), {attribute: made_here})

    def learn(self, weights: Iterable[Weight]) -> None:
        """Makes these weights trainable; all others stay as they are."""
        learned: dict[int, dict[str, nn.Parameter]] = {}
        for weight in weights:
            leaf = self.leaves[weight.name]
            if leaf.codes:
                module = self.module.get_submodule(leaf.path)
                learned[id(module.scale)] = found = module.learn()
                self._paths.update({_key(weight.name, part): f"{leaf.path}.{part}" for part in found})
                self._learning.update({_key(weight.name, part): parameter for part, parameter in found.items()})
            else:
                self._paths[weight.name] = leaf.path
                self._learning[weight.name] = self.module.get_parameter(leaf.path).requires_grad_(True)
        # What is tied shares its scale, and so its gain and its factors.
        for module in self.module.modules():
            if isinstance(module, QLinear) and id(module.scale) in learned:
                for part, parameter in learned[id(module.scale)].items():
                    module._buffers.pop(part, None)
                    module.register_parameter(part, parameter)
                # A buffer is whole on every process, where parameters may be sharded.
                frozen = module.scale.detach()
                del module._parameters["scale"]
                module.register_buffer("scale", frozen)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """What is trained, by the name of the weight on disk: the weight, or the gains of its scales; NAME.left, NAME.right."""
        return self._learning

    def path_of(self, name: str) -> str:
        """Where something that is trained is in the model."""
        return self._paths[name]

    def learned(self, name: str) -> list[str]:
        """What is trained of a weight, by the names of `trainable`."""
        return [key for part in ("gain", "left", "right") if (key := _key(name, part)) in self._learning]

    def is_gain(self, name: str) -> bool:
        """Whether something that is trained is a share of scales."""
        return name in self.leaves and self.leaves[name].codes

    def masks(self, states: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Where a trained dense weight may differ from zero, by its name on disk, for those that are masked."""
        masked = [n for n in self._learning if n in states and not self.leaves[n].codes and states[n].sparsity is not None]
        return {name: self._learning[name].detach() != 0 for name in masked}

    def parts(self, weight: Weight, learned: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A trained weight's tensors on disk, from all that was learned, by the names of `trainable`."""
        stored = torch_dtype(weight.dtype)
        leaf = self.leaves[weight.name]
        if not leaf.codes:
            # Adding zero makes +0 of -0, which some sparse kernels take for a value.
            return {weight.name: (learned[weight.name].to(stored) + 0).reshape(weight.shape)}
        # Whatever else stands beside the codes, as it is stored.
        q = self.dense_view.qtensor(weight.name)
        assert q is not None
        if (gain := learned.get(weight.name)) is not None:
            # On the grid of the weight's dtype, whatever it is kept in.
            q = replace(q, scale=(q.steps() * gain).to(stored).to(q.scale.dtype), tensor_scale=None)
        if (left := learned.get(_key(weight.name, "left"))) is not None:
            q = replace(q, lowrank=Factors(left.bfloat16(), learned[_key(weight.name, "right")].bfloat16()))
        return qtensor.encode(weight, q)


def _key(name: str, part: str) -> str:
    """What a part of a weight in codes is called among all that is trained: gains go by the weight's own name."""
    return name if part == "gain" else f"{name}.{part}"


def _called(value: Callable[[str], torch.Tensor], parameter: str, _: nn.Module) -> torch.Tensor:
    """What a property asks of its module, which does not matter here."""
    return value(parameter)


class Conversion:
    """transformers' conversion of a group of tensors, which only moves numbers about, and the way back for gradients."""

    def __init__(self, mapping: Mapping, group: Group, shapes: list[tuple[int, ...]]) -> None:
        self.mapping, self.group, self.shapes = mapping, group, shapes
        ends = torch.tensor([torch.Size(shape).numel() for shape in shapes]).cumsum(0).tolist()
        self.starts, self.total = [0, *ends[:-1]], ends[-1]
        places = self.places()
        moved = torch.cat([place.flatten() for place in places.values()])
        if len(moved) != self.total or not torch.equal(moved.sort().values, torch.arange(self.total, dtype=moved.dtype)):
            got = "a computation with them"
            raise InputError(group.parameter, "parameters that are the tensors on disk in another order", got, "skip them")

    def run(self, sources: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters that these sources become."""
        given = dict(zip(self.group.sources, sources, strict=True))
        return self.mapping.convert(self.group, given.__getitem__)

    def places(self) -> dict[str, torch.Tensor]:
        """Which number of all sources each entry of a parameter is."""
        counted = (torch.arange(a, a + torch.Size(s).numel()).view(s) for a, s in zip(self.starts, self.shapes, strict=True))
        return self.run(counted)

    def back(self, parameter: str, grad: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of the sources, zero where they are not part of this parameter."""
        flat = grad.new_zeros(self.total)
        flat[self.places()[parameter].flatten().to(grad.device)] = grad.flatten()
        parts = flat.split([torch.Size(shape).numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


class _Converted(torch.autograd.Function):
    """One parameter of a conversion."""

    @staticmethod
    def forward(ctx: Any, conversion: Conversion, parameter: str, *sources: torch.Tensor) -> torch.Tensor:
        ctx.conversion, ctx.parameter = conversion, parameter
        # A view of a source would be taken for one of its parameter's.
        return conversion.run(sources)[parameter].clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.conversion.back(ctx.parameter, grads[0])
