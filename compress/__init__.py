"""compress: a compiler for model checkpoints.

    from compress import Context, open_source, parse_one_liner, run
    run(parse_one_liner("quantize.rtn(scheme=w4a16g64) | pack"), open_source("DIR"), Path("OUT"), Context())

Names are loaded when they are asked for, so that importing the package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Checkpoint": "checkpoint",
    "CompressError": "errors",
    "Context": "contract",
    "Format": "contract",
    "Manifest": "manifest",
    "Options": "pipeline",
    "Pass": "contract",
    "QTensor": "qtensor",
    "Recipe": "recipe",
    "Result": "pipeline",
    "Scheme": "scheme",
    "TensorPass": "contract",
    "load": "artifact",
    "open_checkpoint": "checkpoint",
    "open_source": "source",
    "parse_one_liner": "recipe",
    "parse_yaml": "recipe",
    "run": "pipeline",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'compress' has no attribute '{name}'")
    return getattr(importlib.import_module(f"compress.{_HOMES[name]}"), name)
