"""Registers the native format with transformers.

After `import compress.hf`, AutoModelForCausalLM.from_pretrained(ARTIFACT) loads it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.artifact import Filling
from compress.checkpoint import CANONICAL, open_checkpoint
from compress.errors import InputError, UsageError
from compress.qtensor import PARTS

_LOG = logging.getLogger("compress")


@register_quantization_config(CANONICAL)
class CompressConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says; `backend`, which it does not say, names the one that runs all weights."""

    def __init__(self, **content: Any) -> None:
        self.backend: str | None = None
        self.__dict__.update(content, quant_method=CANONICAL)


@register_quantizer(CANONICAL)
class CompressQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads what is packed beside what transformers loads by itself."""

    requires_calibration = True
    filling: Filling

    def validate_environment(self, *args: Any, device_map: Any = None, **options: Any) -> None:
        """Raises UsageError for weights on several devices."""
        if isinstance(device_map, dict) and len(set(map(str, device_map.values()))) > 1:
            raise UsageError("device_map", "one device for the whole model", str(device_map), "name one, such as 'cpu'")

    def update_device_map(self, device_map: Any) -> Any:
        # Sizes are not known when transformers deals modules out, so all of them go to one device.
        if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            return {"": torch.accelerator.current_accelerator() or torch.device("cpu")}
        return device_map

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        files = options.get("checkpoint_files")
        if not files:
            raise InputError("from_pretrained", "the directory of an artifact, or its Hub id", "a state dict", "leave it out")
        dtype = options.get("dtype") or model.dtype
        self.filling = Filling(model, open_checkpoint(Path(files[0]).parent), dtype, self.quantization_config.backend)
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {rf"\.({'|'.join(('tiles', *PARTS))})$"}

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None:
        self.filling.fill()
        del self.filling

    def is_serializable(self) -> bool:
        _LOG.warning("a packed model is not saved again: copy the directory that it was loaded from")
        return False

    @property
    def is_trainable(self) -> bool:
        """With adapters beside the packed weights, through which gradients go."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True
