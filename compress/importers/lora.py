"""Lora: the factor of an adapter's product, from PEFT's config.

It is alpha / r, or alpha / sqrt(r) with rslora (Hu et al., 2106.09685; Kalajdzievski, 2312.03732). Patterns may give modules
ranks and alphas of their own.
"""

from __future__ import annotations

import re
from typing import Any

from compress.errors import InputError


def refuse_other(where: str, config: dict[str, Any]) -> None:
    """Raises InputError for an adapter of another kind."""
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("modules_to_save"):
        got = f"{config.get('peft_type')}" + (" with DoRA" if config.get("use_dora") else "")
        raise InputError(where, "a LoRA adapter without DoRA and modules_to_save", got)


def scaling(config: dict[str, Any], path: str, rank: int) -> float:
    """The factor of a module's product."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = value
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)
