"""What a compressed-tensors config says of a module: bits, groups, format.

If several targets match a module, an exact name wins over a regex (`re:`, matched from the start; the alphabetically first
one), and a regex over a class. Headers do not tell classes: modules whose name suggests an embedding take the target
Embedding, all others the other classes. Stored tensors tell what is quantized; no reader finds one that `ignore` names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from compress.errors import InputError
from compress.importers.packed import Stored
from compress.spec.scheme import BLOCK

FORMATS = (
    "float-quantized", "int-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized",
    "naive-quantized", "nvfp4-pack-quantized", "pack-quantized",
)  # fmt: skip
_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
_BITS = {
    "mxfp4-pack-quantized": 4, "mxfp6-pack-quantized": 6, "mxfp8-quantized": 8, "nvfp4-pack-quantized": 4,
    "float-quantized": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Quantization arguments of the weights of one config group."""

    where: str
    format: str
    bits: int
    integer: bool
    symmetric: bool
    strategy: str
    group: int | None
    block: tuple[int, int]
    activations: bool
    inputs: str
    """The rounding of activations as a scheme names it; empty if no scheme has it."""

    def bad(self, where: str, expected: str, got: str) -> InputError:
        return InputError(f"{self.where}: {where} (compressed-tensors)", expected, got)

    def grid(self, stored: Stored, module: str, rows: int, columns: int) -> tuple[int | None, list[tuple[int, ...]]]:
        """Columns per scale (None: all), and the shapes that the scales may have."""
        if self.strategy == "tensor":
            return None, [(1,), (), (1, 1)]
        if self.strategy == "channel":
            return None, [(rows, 1), (rows,)]
        if self.strategy == "block":
            return self.block[1], [(-(-rows // self.block[0]), -(-columns // self.block[1]))]
        if not self.group or columns % self.group:
            raise stored.bad(f"{module}.weight", "a group_size that divides its columns", f"{self.group} for {columns}")
        return self.group, [(rows, columns // self.group)]


@dataclass(frozen=True)
class Targets:
    """Which modules take which arguments."""

    exact: dict[str, Arguments]
    regexes: tuple[tuple[re.Pattern[str], Arguments], ...]
    classes: tuple[tuple[str, Arguments], ...]
    every: frozenset[Arguments]
    ignored: tuple[tuple[str, re.Pattern[str] | None], ...]
    caches: bool
    """Whether attention has scales of its own, for the KV cache or in a group without weights."""

    @classmethod
    def read(cls, stored: Stored, config: dict[str, Any]) -> Targets:
        """The targets of a config. Raises InputError."""
        _refuse(stored, config)
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not (groups or config.get("kv_cache_scheme")):
            raise stored.bad_config("config_groups", groups)
        pairs = [pair for name, group in groups.items() for pair in _group(stored, name, group, config.get("format"))]
        exact: dict[str, Arguments] = {}
        for target, args in pairs:
            exact.setdefault(target, args)
        regexes = sorted(((target, args) for target, args in pairs if target.startswith("re:")), key=lambda pair: pair[0])
        classes = tuple((target, args) for target, args in pairs if not target.startswith("re:") and "." not in target)
        compiled = tuple((_compiled(stored, target), args) for target, args in regexes)
        caches = bool(config.get("kv_cache_scheme")) or not all(group.get("weights") for group in groups.values())
        return cls(exact, compiled, classes, frozenset(args for _, args in pairs), _ignored(stored, config), caches)

    def of(self, stored: Stored, module: str) -> Arguments:
        """The arguments of one module. Raises InputError if no group targets it."""
        for name, pattern in self.ignored:
            if name == module or (pattern is not None and pattern.match(module)):
                raise stored.bad_config(f"{module}, which is packed, outside of ignore", f"'{name}'")
        if module in self.exact:
            return self.exact[module]
        for regex, args in self.regexes:
            if regex.match(module):
                return args
        embedding = "emb" in module.rpartition(".")[2] or module.endswith("wte")
        for target, args in self.classes:
            if ("Embedding" in target) == embedding:
                return args
        if len(self.every) == 1:
            # Names on disk may differ from module names, but if all groups have the same arguments, these apply.
            return next(iter(self.every))
        raise stored.bad_config(f"a group of config_groups that targets {module}", "none")


def _refuse(stored: Stored, config: dict[str, Any]) -> None:
    transform = config.get("transform_config")
    if transform and (not isinstance(transform, dict) or transform.get("config_groups")):
        raise stored.bad_config("weights in their own basis", "a transform_config: activations are rotated as it runs")
    if config.get("quantization_status", "compressed") != "compressed":
        raise stored.bad_config("quantization_status compressed", config["quantization_status"])
    sparsity = config.get("sparsity_config") or {}
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise stored.bad_config("no sparsity_config", sparsity["format"], "use the version of compressed-tensors that made it")


def _group(stored: Stored, name: str, group: Any, top: Any) -> list[tuple[str, Arguments]]:
    """The targets of one group; none if it does not quantize weights."""
    if not isinstance(group, dict):
        raise stored.bad_config(f"an object in config_groups.{name}", group, "write the preset's arguments out")
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise stored.bad_config(f"a list of names in config_groups.{name}.targets", targets)
    kind = group.get("format") or top
    if not group.get("weights") or kind == "dense":
        return []
    args = _arguments(stored, name, group, kind)
    return [(target, args) for target in targets]


def _ignored(stored: Stored, config: dict[str, Any]) -> tuple[tuple[str, re.Pattern[str] | None], ...]:
    names = config.get("ignore") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise stored.bad_config("a list of names in ignore", names)
    return tuple((name, _compiled(stored, name) if name.startswith("re:") else None) for name in names)


def _compiled(stored: Stored, target: str) -> re.Pattern[str]:
    try:
        return re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise stored.bad_config("regexes in targets", f"'{target}': {error}") from None


def _arguments(stored: Stored, name: str, group: dict[str, Any], kind: Any) -> Arguments:
    weights = group["weights"]
    here = f"config_groups.{name}.weights"
    if not isinstance(weights, dict):
        raise stored.bad_config(f"an object in {here}", weights)
    if kind not in FORMATS:
        raise stored.bad_config(f"a format among {', '.join(FORMATS)} for config_groups.{name}", kind)
    bits, size, type_ = weights.get("num_bits", 8), weights.get("group_size"), weights.get("type", "int")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8 or _BITS.get(kind, bits) != bits:
        raise stored.bad_config(f"num_bits {_BITS.get(kind, '1 to 8')} in {here} for {kind}", bits)
    if type_ not in ("int", "float"):
        raise stored.bad_config(f"type int or float in {here}", type_)
    size = None if size == -1 else size
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise stored.bad_config(f"a group_size above 0 in {here}", size)
    block = weights.get("block_structure")
    # The defaults of compressed-tensors if no strategy is named.
    default = "tensor" if weights.get("group_size") is None else "group" if size else "channel"
    strategy = weights.get("strategy") or default
    if strategy not in _STRATEGIES:
        raise stored.bad_config(f"a strategy among {', '.join(_STRATEGIES)} in {here}", strategy)
    pair = (0, 0)
    if strategy == "block":
        if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
            raise stored.bad_config(f"a block_structure of two numbers in {here}", block)
        pair = (block[0], block[1])
    activations = any(group.get(key) for key in ("input_activations", "output_activations"))
    return Arguments(
        str(stored.checkpoint.path), kind, bits, type_ == "int", bool(weights.get("symmetric", True)), strategy, size, pair,
        activations, _inputs(group, strategy),
    )  # fmt: skip


def _inputs(group: dict[str, Any], strategy: str) -> str:
    """What a scheme calls the rounding of activations: whole numbers or FP8 with a scale per token, FP8 with block weights per
    128 inputs of a token, or E2M1 in blocks like those of the weights."""
    said, weights = group.get("input_activations"), group["weights"]
    if not isinstance(said, dict) or group.get("output_activations"):
        return ""
    kind, dynamic = said.get("type", "int"), said.get("dynamic")
    if (said.get("num_bits"), kind, said.get("symmetric", True)) == (4, "float", True):
        shape = said.get("strategy"), said.get("group_size")
        if weights.get("type") != "float" or (weights.get("strategy"), weights.get("group_size")) != shape:
            return ""
        nvidia, open_compute = (*shape, dynamic) == ("tensor_group", 16, "local"), (*shape, dynamic) == ("group", 32, True)
        return "nvfp4" if nvidia else "mxfp4" if open_compute else ""
    if dynamic is not True:
        return ""
    if kind == "int" and said.get("strategy") == "token" and said.get("num_bits", 8) in (4, 8):
        if strategy == "block" or weights.get("type", "int") != "int":
            return ""
        return f"int{said.get('num_bits', 8)}{'' if said.get('symmetric', True) else '-asym'}"
    blocks = strategy == "block" and (said.get("strategy"), said.get("group_size")) == ("group", BLOCK)
    if said.get("num_bits", 8) != 8 or not said.get("symmetric", True) or not (blocks or said.get("strategy") == "token"):
        return ""
    return "fp8" if kind == "float" else ""
