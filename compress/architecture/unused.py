"""Unused: tensors on disk that the model does not take, e.g. for further tokens.

They are carried along as they are. Some readers do take them, with the model's own quantization_config: what that says of linears
must not be said of these.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.architecture.weight_map import Model


def further_tokens(model: Model) -> list[str]:
    """Tensors of layers that predict further tokens (MTP): `mtp.*`, or numbered after the last block of the model."""
    last = max((blocks for stack, blocks in model.stacks.items() if not stack.startswith("tower:")), default=0)
    numbers = ((name, re.search(r"(?:^|\.)layers\.(\d+)\.", name)) for name in model.unused)
    return [name for name, number in numbers if re.search(r"(^|\.)mtp\.", name) or (number and int(number[1]) >= last)]


def unused_paths(model: Model) -> list[str]:
    """The shortest paths that hold all unused matrices and nothing that the model takes, such as `model.layers.61`."""
    unused, found, shared = set(model.unused), dict[str, None](), {""}
    for path in (path for weight in model.weights if weight.module and unused for path in (weight.name, weight.module)):
        # What is above a path that is known is known as well.
        while path not in shared:
            shared.add(path)
            path = path.rpartition(".")[0]
    for weight in model.weights:
        if weight.name in unused and len(weight.shape) > 1:
            parts = weight.name.split(".")
            paths = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
            found[next((path for path in paths if path not in shared), weight.name)] = None
    return list(found)
