"""Student: a checkpoint in any state as a model that can be trained.

Trained tensors have their shape on disk, whatever transformers makes of them while it loads: a dense weight in fp32, or for a
weight in codes the gain of each scale, and its low-rank factors in fp32. A parameter that transformers fuses or splits becomes
a property that is computed from them, by transformers' own conversion, whenever it is used. So results are written without a
reverse conversion, experts and fused projections can be in codes, and a mask applies to the weight that it was made for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

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
    from compress.layerwise.meta_model import MetaModel

_PART = "source"
"""Prefix, before a number, of the submodules that hold the parts of a fused parameter."""


@dataclass(frozen=True)
class Leaf:
    """One weight of the checkpoint inside the model: its parameter's path, or the path of its codes."""

    path: str
    codes: bool


class Student:
    """`module` is transformers' model in fp32, in eval mode: without dropout. Raises InputError."""

    learned_parts: ClassVar[tuple[str, ...]] = ("gain", "left", "right")
    """What may be trained of a weight in codes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        meta_model = filled(checkpoint, "float32")
        self._take(meta_model, meta_model.mapping.groups(meta_model.dense_view.logical))

    def _take(self, meta_model: MetaModel, groups: Iterable[Group]) -> None:
        """Makes leaves of the tensors in these groups, whose parameters are loaded in fp32."""
        self.module: Any = meta_model.module
        self.dense_view: DenseView = meta_model.dense_view
        self.leaves: dict[str, Leaf] = {}
        for group in groups:
            name, (path, _, attribute) = group.sources[0], group.parameter.rpartition(".")
            owner = self.module.get_submodule(path)
            if isinstance(owner, QLinear) and attribute == "weight":
                self.leaves[name] = Leaf(path, True)
            elif not group.patterns and name not in self.dense_view.weights:
                self.leaves[name] = Leaf(group.parameter, False)
            else:
                self._fuse(meta_model.mapping, group)
        self._learning: dict[str, nn.Parameter] = {}
        self._paths: dict[str, str] = {}

    def _fuse(self, mapping: Mapping, group: Group) -> None:
        """Turns the parameters that a group becomes into properties, and its source tensors into leaves."""
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
                learned[id(module.scale)] = found = self.open_codes(weight, module)
                self._paths.update({key_of(weight.name, part): f"{leaf.path}.{part}" for part in found})
                self._learning.update({key_of(weight.name, part): parameter for part, parameter in found.items()})
            else:
                self._paths[weight.name] = leaf.path
                self._learning[weight.name] = self.module.get_parameter(leaf.path).requires_grad_(True)
        # Tied weights share their scale, and so its gain and their factors.
        for module in self.module.modules():
            if isinstance(module, QLinear) and id(module.scale) in learned:
                self.share(module, learned[id(module.scale)])
                # FSDP does not shard buffers, so every process has all of it.
                frozen = module.scale.detach()
                del module._parameters["scale"]
                module.register_buffer("scale", frozen)

    def open_codes(self, weight: Weight, module: Any) -> dict[str, nn.Parameter]:
        """Makes a weight in codes trainable; returns its parameters by name."""
        found: dict[str, nn.Parameter] = module.learn()
        return found

    def share(self, module: Any, found: dict[str, nn.Parameter]) -> None:
        """Gives a module, whose codes are those of a trainable one, the same parameters."""
        for part, parameter in found.items():
            module._buffers.pop(part, None)
            module.register_parameter(part, parameter)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained parameters, by name on disk: NAME is a weight, or the gains of its scales; NAME.left, NAME.right factors."""
        return self._learning

    def path_of(self, name: str) -> str:
        """The path in the model of a trained parameter."""
        return self._paths[name]

    def learned(self, name: str) -> list[str]:
        """The trained parameters of a weight, by their names in `trainable`."""
        return [key for part in self.learned_parts if (key := key_of(name, part)) in self._learning]

    def kind(self, name: str) -> Literal["matrix", "other", "scale", "code"]:
        """What a trained parameter is: its learning rate and decay depend on it."""
        return "scale" if self.is_gain(name) else "matrix" if self._learning[name].dim() > 1 else "other"

    def is_gain(self, name: str) -> bool:
        """Whether a trained parameter is the gain of scales."""
        return name in self.leaves and self.leaves[name].codes

    def masks(self, states: dict[str, Any]) -> dict[str, torch.Tensor]:
        """For each trained dense weight that is masked, by name on disk: where it may differ from zero."""
        masked = [n for n in self._learning if n in states and not self.leaves[n].codes and states[n].sparsity is not None]
        return {name: self._learning[name].detach() != 0 for name in masked}

    def parts(self, weight: Weight, learned: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A trained weight's tensors on disk; `learned` are trained values by their names in `trainable`."""
        stored = torch_dtype(weight.dtype)
        leaf = self.leaves[weight.name]
        if not leaf.codes:
            # Adding zero turns -0 into +0: some sparse kernels take -0 for a value.
            return {weight.name: (learned[weight.name].to(stored) + 0).reshape(weight.shape)}
        # The other parts of the quantized weight, as they are stored.
        q = self.scaled(weight, learned)
        if (left := learned.get(key_of(weight.name, "left"))) is not None:
            q = replace(q, lowrank=Factors(left.bfloat16(), learned[key_of(weight.name, "right")].bfloat16()))
        return qtensor.encode(weight, q)

    def scaled(self, weight: Weight, learned: dict[str, torch.Tensor]) -> qtensor.QTensor:
        """A weight in codes as it is stored, with the gains of its scales if they were trained."""
        q = self.dense_view.qtensor(weight.name)
        assert q is not None
        if (gain := learned.get(weight.name)) is None:
            return q
        # Scales are rounded to the weight's dtype, whatever dtype they are stored in.
        return replace(q, scale=(q.steps() * gain).to(torch_dtype(weight.dtype)).to(q.scale.dtype), tensor_scale=None)


def key_of(name: str, part: str) -> str:
    """The name in `trainable` of a part of a weight in codes; gains have the weight's own name."""
    return name if part == "gain" else f"{name}.{part}"


def _called(value: Callable[[str], torch.Tensor], parameter: str, _: nn.Module) -> torch.Tensor:
    """The getter of a property; it ignores the module."""
    return value(parameter)


class Conversion:
    """transformers' conversion of a group of tensors, which only reorders numbers, and its inverse for gradients."""

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
        """For each entry of a parameter its index among the numbers of all sources."""
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
        # Cloned, because autograd would take the result for a view of a source.
        return conversion.run(sources)[parameter].clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.conversion.back(ctx.parameter, grads[0])
