"""Importers: checkpoints of other tools, decoded to codes or dense weights.

`open_foreign` reads headers, configs and the small tensors that decide a meaning; each weight it finds can then be
read by itself, as a QTensor where a scheme here has the same numbers, else dense. One file per method describes
its layout and how its reader rounds.

Imports errors, spec, numerics, checkpoint.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from compress.checkpoint.reader import ADAPTER_CONFIG, ADAPTER_TENSORS, CANONICAL, NATIVE, read_json
from compress.errors import InputError
from compress.importers.packed import Foreign, Packed, Stored

if TYPE_CHECKING:
    from compress.checkpoint.reader import Checkpoint

__all__ = ["METHODS", "Foreign", "Packed", "method_of", "open_foreign"]

METHODS = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gguf", "gptq", "mlx", "mxfp4", "peft")
"""Values of `quant_method` that are read here, PEFT's adapters, and GGUF files."""
_CONFIG_FILES = ("quantize_config.json", "quant_config.json")
"""Where AutoGPTQ and AutoAWQ wrote their config before config.json had a place for it."""


def _config(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]] | None:
    """The quantization config and the file that it is in, None for a checkpoint without one."""
    if any(ref.kind for ref in checkpoint.refs.values()):
        return "config.json", {"quant_method": "gguf"}
    text = checkpoint.config.get("text_config")
    places = [checkpoint.config] + ([text] if isinstance(text, dict) else [])
    for place in places:
        for key in ("quantization_config", "compression_config", "quantization"):
            if found := place.get(key):
                if not isinstance(found, dict):
                    raise InputError(str(checkpoint.path / "config.json"), f"an object in {key}", type(found).__name__)
                return "config.json", found
    for file in _CONFIG_FILES:
        if (checkpoint.path / file).is_file() and any(name.endswith(".qweight") for name in checkpoint.refs):
            return file, read_json(checkpoint.path / file)
    if any(ref.file == ADAPTER_TENSORS for ref in checkpoint.refs.values()):
        return ADAPTER_CONFIG, {**read_json(checkpoint.path / ADAPTER_CONFIG), "quant_method": "peft"}
    return None


def _named(checkpoint: Checkpoint, config: dict[str, Any]) -> str:
    """The method by its name, or, in old files that name none, by what the config and the tensors have."""
    method = config.get("quant_method") or config.get("method")
    if method == CANONICAL and config.get("format") == NATIVE:
        return NATIVE
    if isinstance(method, str):
        return method.lower()
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "bitsandbytes"
    if {"bits", "group_size"} <= config.keys() and any(
        name.endswith(".scales") and checkpoint.refs.get(f"{name.removesuffix('scales')}weight") is not None
        for name in checkpoint.refs
    ):
        return "mlx"
    for name, ref in checkpoint.refs.items():
        scales = checkpoint.refs.get(name.removesuffix("qweight") + "scales")
        if name.endswith(".qweight") and scales is not None and len(ref.shape) == len(scales.shape) == 2:
            # Both pack eight codes in a word; GPTQ does so down the inputs and AWQ along the outputs.
            return "gptq" if ref.shape[1] == scales.shape[1] else "awq"
    return "unknown"


def method_of(checkpoint: Checkpoint) -> str | None:
    """The method that a checkpoint's config names, known here or not; None for one that is not quantized. No torch."""
    found = _config(checkpoint)
    return None if found is None else _named(checkpoint, found[1])


def open_foreign(checkpoint: Checkpoint) -> Foreign:
    """Every quantized weight of a checkpoint. Raises InputError for a method or a layout that is not known.

    Headers and configs are read, and the small tensors that decide a meaning (g_idx, zero points, weight shapes, the
    JSON of bitsandbytes). Of a checkpoint whose shards are elsewhere, headers alone are judged, with a note.
    """
    found = _config(checkpoint)
    method = None if found is None else _named(checkpoint, found[1])
    if found is None or method not in METHODS:
        raise InputError(
            str(checkpoint.path), f"a checkpoint quantized by one of {', '.join(METHODS)}",
            f"one quantized by {method}" if method else "one without a quantization config",
            "start from the model it was made from",
        )  # fmt: skip
    file, config = found
    decoder = import_module(f"compress.importers.{method.replace('-', '_')}")
    foreign = decoder.decode(Stored(checkpoint, method, file), config)
    assert isinstance(foreign, Foreign)
    return foreign
