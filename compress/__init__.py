"""compress: a compiler for model checkpoints.

    import compress
    compress.run("quantize.rtn(scheme=w4a16g64) | pack(format=native)", "MODEL", "OUT")  # MODEL: directory, Hub id or model
    model = compress.load("OUT")

Names are loaded when they are asked for, so that importing the package imports no torch; `dir(compress)` lists them.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Checkpoint": "checkpoint.reader",
    "CompressError": "errors",
    "Context": "context",
    "DataPass": "contract.shapes",
    "Format": "contract.format",
    "LinearPass": "contract.shapes",
    "LossPass": "contract.train_pass",
    "Manifest": "checkpoint.manifest",
    "Options": "pipeline.run",
    "Pass": "contract.pass_base",
    "QTensor": "numerics.qtensor",
    "Recipe": "spec.recipe",
    "Result": "pipeline.run",
    "Scheme": "spec.scheme",
    "TensorPass": "contract.shapes",
    "TrainPass": "contract.train_pass",
    "compare": "evaluate.perplexity_kl",
    "load": "runtime.artifact",
    "open_checkpoint": "checkpoint.reader",
    "open_source": "checkpoint.source",
    "parse_one_liner": "spec.recipe",
    "parse_yaml": "spec.recipe_file",
    "plan_of": "api",
    "run": "api",
    "token_windows": "layerwise.eval_windows",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'compress' has no attribute '{name}'")
    return getattr(importlib.import_module(f"compress.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
