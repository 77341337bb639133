"""Block student: one block of a meta model as a module that can be trained.

While a block is trained, a copy takes its place. The copy is loaded in fp32, and codes stay codes; then it is made trainable as
a whole model is (student.py), fused parameters and all. Afterwards the block itself comes back, with nothing loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from compress.contract.block_training import BlockOptions
from compress.executors.train.student import Student
from compress.layerwise.meta_model import MetaModel
from compress.layerwise.model import Loader
from compress.spec.weight_state import State, Weight


class BlockStudent(Student):
    """A TrainedBlock: dense weights, what is between zeros, scales of codes and low-rank factors."""

    def __init__(self, loader: Loader, path: str, weights: Sequence[Weight], states: Mapping[str, State]) -> None:
        meta_model = loader.meta_model
        self.block: Any = meta_model.module_at(path)
        stored, meta_model.dtype = meta_model.dtype, torch.float32
        try:
            loader.load_part(path)
        finally:
            meta_model.dtype = stored
        self._take(meta_model, [group for group in loader.groups.values() if group.parameter.startswith(f"{path}.")])
        self.learn(weights)
        self.held = self.masks(dict(states))

    def rate(self, name: str, options: BlockOptions) -> float | None:
        """The peak learning rate of a trained parameter; None for one over the number of steps."""
        return options.scale_lr if self.is_gain(name) else options.lr

    def settle(self, options: BlockOptions) -> None:
        """Takes trained parameters back into their range after a step; here they have none."""

    def written(self, weight: Weight) -> dict[str, torch.Tensor]:
        """The tensors on disk of a trained weight, as it is now."""
        keys = self.learned(weight.name)
        return self.parts(weight, {key: self.trainable[key].detach().cpu() for key in keys})


@contextmanager
def copied(meta_model: MetaModel, path: str) -> Iterator[None]:
    """Inside, a copy of the block at `path` is in its place, with nothing loaded."""
    home, _, name = path.rpartition(".")
    parent, block = meta_model.module_at(home), meta_model.module_at(path)
    configs = [part.config for part in block.modules() if hasattr(part, "config")]
    made = copy.deepcopy(block, {id(config): config for config in configs})
    # The forward of its class, not the one that pauses.
    vars(made).pop("forward", None)
    parent._modules[name] = made
    try:
        yield
    finally:
        parent._modules[name] = block
