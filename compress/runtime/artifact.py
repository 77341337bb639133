"""Artifact: loads a packed directory as a runnable model, without a dense copy.

transformers builds the model and loads dense weights; hf.py hooks in before and after. Before, modules whose tensors on disk
are packed become shells without a weight (kernels/native/modules.py); afterwards they get their parts, each in the form that
its backend needs. Which matrices on disk make up a stacked parameter of experts is found by running transformers' own
conversion on their row numbers.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from compress.architecture.attention import round_caches
from compress.architecture.model_class import model_class
from compress.architecture.weight_map import meta_model
from compress.checkpoint.reader import CANONICAL, NATIVE, open_checkpoint
from compress.errors import UsageError
from compress.importers import method_of
from compress.kernels.native.modules import PackedWeight
from compress.layerwise.cache_scales import cache_scales
from compress.layerwise.dense_view import DenseView
from compress.layerwise.model import generation_config
from compress.runtime.fill import packable, refuse_other

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOG = logging.getLogger("compress")


def load(
    path: str | Path, dtype: str = "auto", backend: str | None = None, device: Any = "cpu", repack: bool = False
) -> PreTrainedModel:
    """The model of an artifact in the native format, ready to run, in `dtype` (auto: that of config.json).

    `backend` runs all weights; by default each gets the fastest that supports it. `device` is one, or a device_map of accelerate.
    With `repack`, a checkpoint in codes of our own or of another tool (GPTQ, AWQ, compressed-tensors, ...) is packed while it
    is loaded, weight by weight; weights that cannot be packed stay dense, and are counted in the log.

    Raises InputError for a directory that is not such an artifact, UsageError for a backend that refuses.
    """
    from compress import hf  # noqa: F401  (registers the quantizer)

    checkpoint = open_checkpoint(Path(path))
    settings: dict[str, Any] = {"backend": backend}
    options: dict[str, Any] = {"dtype": dtype, "device_map": device, "local_files_only": True}
    source: str | Path | None = path
    scales: list[tuple[str, Any, Any]] = []
    cls, config = model_class(checkpoint)
    if repack and method_of(checkpoint) != NATIVE:
        if isinstance(device, dict) and "disk" in device.values():
            do = "make an artifact with pack(format=native), which is read from disk as it is"
            raise UsageError("device", "memory for what is packed while it is read", "parts of the model on disk", do)
        dense_view = DenseView(checkpoint, rounded=False)
        kept, notes = packable(dense_view)
        for note in notes:
            _LOG.warning("%s: %d weights, such as %s: %s", note.what, note.count, (*note.names, "none")[0], note.reason)
        placed = dense_view.resolve(meta_model(checkpoint))
        scales, beside = cache_scales(dense_view, placed), {weight.name for weight in placed.weights if weight.kind == "cache"}
        dense = {name: dense_view.dense(name) for name in dense_view.logical if name not in {*kept, *beside}}
        settings |= {"quant_method": CANONICAL, "source": str(path)}
        source, options = None, {**options, "state_dict": dense}
    else:
        refuse_other(checkpoint, "repack=True")
        settings |= checkpoint.config["quantization_config"]
    config.quantization_config = settings
    loader: Any = cls
    model: PreTrainedModel = loader.from_pretrained(source, config=config, **options)
    round_caches(model, scales)
    if source is None:
        generation_config(model, checkpoint)
    return model


def backends(model: nn.Module) -> Counter[str]:
    """The number of weights on disk that each backend runs."""
    found: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, PackedWeight):
            found[module.backend] += module.sources
    return found
