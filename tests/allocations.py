"""Recipes of quantize.llm_mq for tests, and the table that a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support import ready_inputs

SCHEMES = ("w2a16g32-asym", "w3a16g32-asym", "w4a16g32-asym")
CALIBRATE = f"calibrate(data='{ready_inputs()}', samples=6)"


def mq(options: str, schemes: tuple[str, ...] = SCHEMES) -> str:
    return f"{CALIBRATE} | quantize.llm_mq(schemes=[{', '.join(schemes)}], {options})"


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["weight"]: row for row in map(json.loads, (out / "allocation.jsonl").read_text().splitlines())}
