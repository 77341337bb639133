"""HF: registers the native format with transformers.

After `import compress.hf`, AutoModelForCausalLM.from_pretrained(ARTIFACT) loads it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.checkpoint.reader import CANONICAL, Checkpoint, open_checkpoint
from compress.errors import InputError, UsageError
from compress.kernels.native.modules import Shell
from compress.kernels.native.packed import PARTS
from compress.runtime.attention import attend_by_kernel
from compress.runtime.decode_step import quicken
from compress.runtime.fill import PackedWeights
from compress.runtime.generation_cache import grow_caches
from compress.runtime.large_pages import into_large_pages

_PACKED = re.compile(r"\.packed_weights?\.")


@register_quantization_config(CANONICAL)
class CompressConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The quantization config of config.json, and two options for loading. `backend` names one to run all weights.

    `source` is the directory of weights that are packed while they are loaded.
    """

    def __init__(self, **content: Any) -> None:
        self.backend: str | None = None
        self.source: str | None = None
        self.__dict__.update(content, quant_method=CANONICAL)

    def to_dict(self) -> dict[str, Any]:
        """The content for config.json."""
        content: dict[str, Any] = super().to_dict()
        return {key: value for key, value in content.items() if key not in ("backend", "source")}


@register_quantizer(CANONICAL)
class CompressQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads packed weights; transformers loads all others by itself."""

    requires_calibration = True
    filling: PackedWeights
    checkpoint: Checkpoint
    packed: list[str]
    """The tensors on disk that hold packed weights."""

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes per element of a parameter; for the shell of a packed weight those of its packed form."""
        path, _, name = param_name.rpartition(".")
        if name == "stand_in" and isinstance(shell := model.get_submodule(path), Shell):
            return shell.awaited_bytes
        return float(super().param_element_size(model, param_name, param))

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            do = "give a device_map, which puts whole layers on each"
            raise UsageError("from_pretrained", "whole weights on each device", "a plan that splits them", do)
        files: list[str] = options.get("checkpoint_files") or []
        source: str | Path | None = self.quantization_config.source or next((Path(file).parent for file in files), None)
        if source is None:
            raise InputError("from_pretrained", "the directory of an artifact, or its Hub id", "a state dict", "leave it out")
        self.checkpoint = open_checkpoint(Path(source))
        dtype = options.get("dtype") or model.dtype
        self.filling = PackedWeights(model, self.checkpoint, dtype, self.quantization_config.backend)
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {rf"\.({'|'.join(PARTS)})$"}

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None:
        self.filling.fill()
        into_large_pages(model)
        attend_by_kernel(model)
        quicken(model)
        grow_caches(model)
        self.packed = self.filling.tensors()
        del self.filling

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Parameters as they are, and packed weights as they lie in the directory that the model was loaded from.

        Raises UsageError for weights that were packed while loading, and for names that transformers would change.
        """
        from transformers.core_model_loading import WeightRenaming, apply_renamings, revert_weight_conversion

        wanted = "an artifact's weights under their names"
        if self.quantization_config.source:
            do = "make an artifact with pack(format=native)"
            raise UsageError("save_pretrained", wanted, "weights that were packed while they were read", do)
        # transformers renames what it saves back to the names on disk.
        renamings = [entry for entry in model._weight_conversions or () if isinstance(entry, WeightRenaming)]
        inside = {apply_renamings(name, renamings): name for name in self.packed}
        back = revert_weight_conversion(model, {name: torch.empty(0) for name in inside})
        if lost := sorted(set(self.packed) - set(back)):
            do = f"copy the directory {self.checkpoint.path}"
            raise UsageError("save_pretrained", wanted, f"another name for '{lost[0]}'", do)
        found = {name: part for name, part in model.state_dict().items() if not _PACKED.search(name)}
        return {**found, **{name: self.checkpoint.read(on_disk) for name, on_disk in inside.items()}}, {}

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained, because gradients go through the packed weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True
