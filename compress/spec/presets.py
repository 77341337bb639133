"""Presets: schemes by their names in llm-compressor and compressed-tensors.

Case does not matter, nor whether words are joined by `_` or `-`. But a text that is a scheme of the grammar, in lower case, is
that scheme: `w4a16` has one scale per output channel, the preset `W4A16` groups of 128.
"""

from __future__ import annotations

import re

_ALONE = "weights only: activations stay in 16 bits; {} rounds them as well"
PRESETS = {
    "W2A16": "w2a16g128", "W3A16": "w3a16g128", "W4A16": "w4a16g128", "W4A16_ASYM": "w4a16g128-asym", "W8A16": "w8a16g128",
    "W2A8": "w2a8g128", "W3A8": "w3a8g128", "W4A8": "w4a8g128", "W2A4": "w2a4g128", "W3A4": "w3a4g128", "W4A4": "w4a4g128",
    "W4AFP8": "w4a8g128-afp8", "W8A8": "w8a8", "INT8": "w8a8",
    "FP8": "fp8-tensor-afp8", "FP8_DYNAMIC": "fp8-afp8", "FP8_BLOCK": "fp8-block-afp8",
    "NVFP4": "nvfp4", "NVFP4A16": "nvfp4", "MXFP4": "mxfp4", "MXFP4A16": "mxfp4",
}  # fmt: skip
_DIFFERS = {
    "FP8": "activations get a scale per token as the model runs, not one that is measured before",
    "NVFP4": _ALONE.format("nvfp4-anvfp4"), "MXFP4": _ALONE.format("mxfp4-amxfp4"),
}  # fmt: skip
"""How a preset differs here from the other tool's."""
_USUAL = ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "MXFP4")


def preset(text: str) -> str | None:
    """The text of the scheme that a preset means; None if there is no preset of that name."""
    return PRESETS.get(_plain(text))


def remark(text: str) -> str:
    """`W4A16 is w4a16g128 here`, with differences from the other tool."""
    differs = _DIFFERS.get(_plain(text))
    return f"{text} is {preset(text)} here" + (f": {differs}" if differs else "")


def near(text: str) -> str:
    """A suggestion of presets, for a text that is neither a preset nor a scheme."""
    bits = re.search(r"(?<!\d)([2-8])(?!\d)", text)
    listed = [name for name in PRESETS if bits is not None and bits[1] in re.findall(r"\d+", name.partition("A")[0])]
    return f"a preset such as {', '.join(f'{name} ({PRESETS[name]})' for name in listed or _USUAL)}"


def _plain(text: str) -> str:
    return text.strip().upper().replace("-", "_")
