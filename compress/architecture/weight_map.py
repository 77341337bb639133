"""Weight map: for each tensor on disk, its module and its role in the model.

transformers renames, fuses and splits tensors while it loads. Its own mapping is run here on tensors without data, which
gives for each tensor on disk its module, its kind (linear, expert, embedding, head, router, norm), its stack and block,
and its orientation. The same run checks every shape against the config. There is no table of names to maintain.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from compress.architecture.attention import SCALES, Attention, attentions
from compress.architecture.hf_mapping import Mapping
from compress.architecture.left_alone import why_left_alone
from compress.architecture.model_class import model_class
from compress.architecture.stacks import TOWERS, stacks
from compress.checkpoint.reader import CANONICAL, Checkpoint, Logical, torch_dtype
from compress.errors import InputError, Problem
from compress.spec.weight_state import FLOATS, UNREACHED, Kind, Weight

if TYPE_CHECKING:
    from torch import nn

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_layer")
_MOST_BLOCKS = 2000
_BLOCKS = re.compile(r"(layers?|blocks|depth)$")
"""Keys of config.json that say how many blocks there are."""
_ROUTER_NAMES = {"gate", "router", "shared_expert_gate", "wg"}
_NUMBER = re.compile(r"\.\d+(?=\.)")
"""The number of a block or an expert in a path."""
_SAME_PRODUCT = {"FalconLinear"}
"""Classes of linears with a forward of their own that computes x @ w.T + bias all the same."""
_JOINTS = re.compile(r"multi_?modal|projector|connector|merger|aligner")
"""Modules between a tower (vision, audio) and the text model."""


@dataclass(frozen=True)
class Model:
    """Every tensor of a checkpoint, placed in the model that transformers would build."""

    weights: tuple[Weight, ...]
    """Every tensor on disk, in stored order."""
    linears: dict[str, str] = field(default_factory=dict)
    """Every linear module of the model: path -> class name (Linear or Conv1D)."""
    unused: tuple[str, ...] = ()
    """Tensors on disk that the model does not load; they are copied unchanged."""
    duplicates: dict[str, str] = field(default_factory=dict)
    """Tensors on disk that config.json ties to another one on disk: alias -> source."""
    family: str = ""
    stacks: dict[str, int] = field(default_factory=dict)
    """Blocks per stack."""
    by_weight: frozenset[str] = frozenset()
    """Tensors on disk that transformers fuses, splits or permutes under a pattern that ends in `.weight`."""
    initialised: frozenset[str] = frozenset()
    """Linear modules whose `.weight` transformers' initialisation accesses without checking that it exists."""
    unwatched: frozenset[str] = frozenset()
    """Modules of experts whose inputs cannot be observed."""
    attentions: tuple[Attention, ...] = ()
    """Modules that keep keys and values."""


def _refuse_many(config: dict[str, Any]) -> None:
    """Raises InputError for more blocks than any model has: building or listing them would take hours."""
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_many(value)
        elif _BLOCKS.search(key) and isinstance(value, int | float) and value > _MOST_BLOCKS:
            raise InputError("config.json", f"{key} of at most {_MOST_BLOCKS}", str(value))


def meta_model(checkpoint: Checkpoint) -> nn.Module:
    """The model on the meta device, without data."""
    import torch

    _refuse_many(checkpoint.config)
    cls, parsed = model_class(checkpoint)
    blocks = getattr(parsed.get_text_config(), "num_hidden_layers", 0)
    if isinstance(blocks, int) and not 0 < blocks <= _MOST_BLOCKS:
        raise InputError("config.json", f"num_hidden_layers from 1 to {_MOST_BLOCKS}", str(blocks))
    try:
        with torch.device("meta"):
            model = cls(parsed)
    except Exception as error:  # sizes that contradict each other surface as whatever the model's code raises
        raise InputError("config.json", "sizes that fit together", str(error).strip().splitlines()[0]) from error
    assert isinstance(model, torch.nn.Module)
    return model.eval()


def resolve(checkpoint: Checkpoint, allow_dtype_mismatch: bool = False) -> Model:
    """Places every tensor of `checkpoint` in its model. Raises InputError with every shape, dtype and name that is wrong."""
    refuse_quantized(checkpoint)
    return place(checkpoint, checkpoint.logical, meta_model(checkpoint), allow_dtype_mismatch)


def place(checkpoint: Checkpoint, logical: dict[str, Logical], model: nn.Module, allow_dtype_mismatch: bool = False) -> Model:
    """Places every weight of `logical` in `model`, whatever form its bytes are in. Raises InputError."""
    return _Resolver(checkpoint, logical, model).run(allow_dtype_mismatch)


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raises InputError for a checkpoint that another tool, or our own `pack`, has quantized."""
    from compress.importers import method_of

    method, manifest = method_of(checkpoint), checkpoint.manifest
    if method is not None and not (method == CANONICAL and manifest is not None and manifest.format == "canonical"):
        raise InputError(
            str(checkpoint.path), "a dense or canonical checkpoint", f"one that is already quantized ({method})",
            "begin with unpack, or with the model it was made from",
        )  # fmt: skip


class _Resolver:
    def __init__(self, checkpoint: Checkpoint, logical: dict[str, Logical], model: Any) -> None:
        self.checkpoint, self.logical, self.model = checkpoint, logical, model
        self.problems: list[Problem] = []
        self.converted: set[str] = set()
        self.by_weight: set[str] = set()
        self.described: dict[Any, tuple[Kind, bool, str, str, str]] = {}
        self.state = model.state_dict()
        self.modules = dict(model.named_modules())
        self.stacks = stacks(model)
        text = model.config.get_text_config()
        self.family = text.model_type
        self.hidden = getattr(text, "hidden_size", None)
        self.experts = {getattr(text, name) for name in _EXPERT_COUNTS if isinstance(getattr(text, name, None), int)}
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}) or {})
        self.pairs: dict[str, set[str]] = defaultdict(set)
        for alias, kept in self.tied.items():
            self.pairs[alias].add(kept)
            self.pairs[kept].add(alias)
        inputs, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.embeddings = [module for module in (inputs, getattr(model, "shared", None)) if module is not None]

    def run(self, allow_dtype_mismatch: bool) -> Model:
        places = self.places()
        self.attentions = tuple(one for one in attentions(self.model) if not self.block(one.path)[0].startswith("tower:"))
        self.reached = {parameter for parameter, _ in places.values()}
        weights, unused = [], []
        for name, entry in self.logical.items():
            parameter, transposed = places.get(name, ("", False))
            if parameter not in self.state:
                scale = self.cache_scale(name, entry)
                unused += [name] if scale is None else []
                weights.append(Weight(name, entry.dtype, entry.shape) if scale is None else scale)
                continue
            weights.append(self.weight(name, entry, parameter, transposed))
        if not allow_dtype_mismatch:
            self.check_dtypes(weights)
        self.check_missing(self.reached | self.produced)
        if self.problems:
            raise InputError(self.problems[:20])
        on_disk = {parameter: name for name, (parameter, _) in places.items()}
        duplicates = {on_disk[alias]: on_disk[source] for alias, source in self.tied.items() if {alias, source} <= on_disk.keys()}
        from transformers.pytorch_utils import Conv1D

        linears = {path: type(m).__name__ for path, m in self.modules.items() if _is_linear(m) or isinstance(m, Conv1D)}
        from compress.architecture.experts import watched

        experts = {weight.module for weight in weights if weight.kind == "expert"}
        hidden = {p for p in experts if not _is_linear(self.modules[p]) and not watched(self.modules[p])}
        return Model(
            tuple(weights), linears, tuple(unused), duplicates, self.model.config.model_type, {s: n for _, s, n in self.stacks},
            frozenset(self.by_weight), _initialised(self.model, linears), frozenset(hidden), self.attentions,
        )  # fmt: skip

    def places(self) -> dict[str, tuple[str, bool]]:
        """Name on disk -> (parameter of the model, whether loading transposes it). Checks shapes as well.

        Fusing and splitting run without data; every result must have its parameter's shape.
        """
        import torch
        from transformers.core_model_loading import Transpose

        mapping = Mapping(self.model)
        places: dict[str, tuple[str, bool]] = {}
        self.produced: set[str] = set()
        # Blocks are alike, and fusing hundreds of experts takes its time even without data.
        known: dict[Any, Any] = {}
        for group in mapping.groups(self.logical):
            entry = self.logical[group.sources[0]]
            if not group.patterns:
                if entry.shape != tuple(self.state[group.parameter].shape):
                    expected = f"shape {list(self.state[group.parameter].shape)} by config.json"
                    self.wrong(group.sources[0], expected, f"{list(entry.shape)}")
                places[group.sources[0]] = (group.parameter, False)
                continue
            transposed = any(isinstance(operation, Transpose) for operation in mapping.operations(group))
            places.update(dict.fromkeys(group.sources, (group.parameter, transposed)))
            self.converted.update(group.sources)
            if mapping.only_weights(group):
                self.by_weight.update(group.sources)

            def empty(name: str) -> torch.Tensor:
                return torch.empty(self.logical[name].shape, dtype=torch_dtype(self.logical[name].dtype), device="meta")

            kinds = tuple((self.logical[name].dtype, self.logical[name].shape) for name in group.sources)
            alike = re.sub(r"\d+", "#", group.parameter), self.state[group.parameter].shape, group.patterns, kinds
            try:
                results = {group.parameter: known[alike]} if alike in known else mapping.convert(group, empty)
            except Exception as error:  # the operations raise whatever torch raises on shapes that do not fit
                self.wrong(group.sources[0], f"tensors that make up {group.parameter}", str(error).splitlines()[0])
                self.produced.add(group.parameter)
                continue
            if [*results] == [group.parameter]:
                known[alike] = results[group.parameter]
            for name, got in results.items():
                self.produced.add(name)
                if name in self.state and got.shape != self.state[name].shape:
                    self.wrong(group.sources[0], f"shape {list(self.state[name].shape)} of {name}", f"{list(got.shape)}")
        return places

    def cache_scale(self, name: str, entry: Logical) -> Weight | None:
        """A scale of keys or values, which is no parameter of the model; None for any other tensor."""
        if name.rpartition(".")[2] not in SCALES:
            return None
        path, _, attribute = Mapping(self.model).place(name)[0].rpartition(".")
        if path not in {attention.path for attention in self.attentions}:
            return None
        kind = type(self.modules[path]).__name__
        return Weight(name, entry.dtype, entry.shape, "cache", path, attribute, kind, *self.block(path))

    def wrong(self, name: str, expected: str, got: str, do: str = "") -> None:
        ref = self.checkpoint.refs.get(name)
        self.problems.append(Problem(f"{ref.file}: '{name}'" if ref else f"'{name}'", expected, got, do))

    def weight(self, name: str, entry: Logical, parameter: str, transposed: bool) -> Weight:
        """The kind, place and orientation of one tensor."""
        path, _, attribute = parameter.rpartition(".")
        module = self.modules[path]
        stack, block = self.block(path)
        # Blocks are alike, and so are their experts: what differs in numbers alone is described once.
        places = (name, parameter) if block is None else (_NUMBER.sub(".#", name), _NUMBER.sub(".#", parameter))
        alike = *places, type(module), entry.dtype, entry.shape, stack
        if alike not in self.described:
            self.described[alike] = self.describe(name, entry, parameter, stack, block)
        kind, flipped, unclear, unlearned, left_alone = self.described[alike]
        flipped = flipped ^ transposed if len(entry.shape) >= 2 else False
        return Weight(
            name, entry.dtype, entry.shape, kind, path, attribute, type(module).__name__, stack, block, flipped,
            name in self.converted, unclear, unlearned, left_alone,
        )  # fmt: skip

    def describe(
        self, name: str, entry: Logical, parameter: str, stack: str, block: int | None
    ) -> tuple[Kind, bool, str, str, str]:
        """(kind, stored as [in, out], why its orientation is unclear, why nothing trains it, why it is left alone)."""
        path, _, attribute = parameter.rpartition(".")
        module, left_alone = self.modules[path], ""
        kind, flipped, unclear = self.kind(name, path, module, attribute, entry.shape, block)
        if block is not None and not stack.startswith("tower:"):
            prefix = next(prefix for prefix, other, _ in self.stacks if other == stack)
            left_alone = why_left_alone(self.family, parameter.removeprefix(f"{prefix}.{block}."))
            if kind == "other" and not left_alone:
                unclear = self.undescribed(module, attribute, entry)
        return kind, flipped, unclear, self.unlearned(path, module, attribute), left_alone

    def undescribed(self, module: nn.Module, attribute: str, entry: Logical) -> str:
        """Why nothing tells what a matrix of a block is; empty for what is no matrix, a table that is looked up, or a buffer."""
        from torch import nn

        matrix = sum(size > 1 for size in entry.shape) >= 2 and entry.dtype in FLOATS
        if not matrix or isinstance(module, nn.Embedding) or attribute in module._buffers:
            return ""
        return f"{type(module).__name__}.{attribute} {list(entry.shape)} is a matrix of no kind that is known here"

    def kind(
        self, name: str, path: str, module: nn.Module, attribute: str, shape: tuple[int, ...], block: int | None
    ) -> tuple[Kind, bool, str]:
        """(kind, stored as [in, out], why its orientation is unclear)."""
        from torch.nn.modules.conv import _ConvNd
        from transformers.pytorch_utils import Conv1D

        label, last = type(module).__name__.lower(), path.rpartition(".")[2]
        if "bias" in attribute:
            return "bias", False, ""
        if "norm" in label:
            return "norm", False, ""
        if any(module is embedding for embedding in self.embeddings):
            return "embedding", False, ""
        if module is self.head:
            # A tied pair that is stored once counts as the embedding, whatever its name.
            pair = {f"{path}.{attribute}", *self.pairs.get(f"{path}.{attribute}", ())}
            return ("head" if len(pair) == 1 or len(pair & self.reached) > 1 else "embedding"), False, ""
        outer = type(self.modules[path.rpartition(".")[0]]).__name__.lower()
        if "router" in label or "topk" in label or (last in _ROUTER_NAMES and shape[0] in {*self.experts, 1}):
            return "router", False, ""
        if "router" in outer and _is_linear(module):
            return "router", False, ""
        if isinstance(module, Conv1D) and attribute == "weight":
            return "linear", True, ""
        if isinstance(module, _ConvNd):
            return "convolution", False, ""
        expert = re.search(r"experts\.\d+\.", name) is not None
        if _is_linear(module) and attribute == "weight" and len(shape) == 2:
            return ("expert" if expert else "linear"), False, _own_product(module)
        parameter = self.state[f"{path}.{attribute}"]
        if block is not None and parameter.dim() == 3 and parameter.shape[0] in self.experts and min(parameter.shape) > 1:
            flipped, unclear = self.orientation(module, attribute if attribute != "weight" else last, parameter.shape)
            return "expert", flipped, unclear
        return "other", False, ""

    def orientation(self, module: nn.Module, word: str, shape: Any) -> tuple[bool, str]:
        """Whether fused experts are stored [experts, in, out]: transformers' own mark, else the hidden size."""
        mark = getattr(module, "is_transposed", None)
        if isinstance(mark, bool):
            return mark, ""
        if shape[1] != shape[2] and self.hidden in shape[1:]:
            reads_hidden = not re.search(r"down|output|w2|wo\b", word)
            return (shape[1] == self.hidden) == reads_hidden, ""
        return False, f"nothing tells which of {list(shape)} is the input dimension of fused experts"

    def unlearned(self, path: str, module: Any, attribute: str) -> str:
        """Why training on texts does not change a tensor; empty if it does."""
        if attribute in module._buffers:
            return "a buffer"
        towers = (regex for _, regex in TOWERS)
        has_towers = any(stack.startswith("tower:") for _, stack, _ in self.stacks)
        return UNREACHED if has_towers and any(regex.search(path) for regex in (*towers, _JOINTS)) else ""

    def block(self, path: str) -> tuple[str, int | None]:
        for prefix, stack, _ in self.stacks:
            if path.startswith(prefix + "."):
                return stack, int(path[len(prefix) + 1 :].split(".")[0])
        return "", None

    def check_dtypes(self, weights: list[Weight]) -> None:
        """Matrices must have the dtype that config.json names, because readers cast to it silently."""
        config = self.checkpoint.config
        promised = config.get("dtype") or config.get("torch_dtype")
        names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
        for weight in weights:
            if weight.kind not in ("linear", "expert", "embedding", "head"):
                continue
            if weight.dtype not in FLOATS:
                self.wrong(weight.name, "BF16, F16 or F32", weight.dtype, "start from the model this was made from")
            elif isinstance(promised, str) and promised in names and weight.dtype != names[promised]:
                self.wrong(weight.name, f"{names[promised]}, config.json's dtype", weight.dtype,
                           "correct config.json, or pass --allow-dtype-mismatch: readers will cast it")  # fmt: skip

    def check_missing(self, reached: set[str]) -> None:
        ignored = [re.compile(p) for p in getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()]
        buffers = {name for name, _ in self.model.named_buffers()}
        for parameter in self.state:
            source = self.tied.get(parameter)
            if parameter in reached or source in reached or parameter in buffers:
                continue
            if any(alias in reached for alias, target in self.tied.items() if target == parameter):
                continue
            if not any(pattern.search(parameter) for pattern in ignored):
                do = "fetch the model again, or say in config.json what it is tied to"
                self.problems.append(Problem(f"'{parameter}'", "a tensor for it on disk", "none", do))


def _is_linear(module: nn.Module) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear)


def _own_product(module: nn.Module) -> str:
    """Why codes cannot take the place of a linear's weight: its class multiplies in a way of its own. Else empty."""
    from torch import nn

    own = type(module).forward is not nn.Linear.forward and type(module).__name__ not in _SAME_PRODUCT
    return f"{type(module).__name__} multiplies in a way of its own, which no reader does with codes" if own else ""


def _initialised(model: nn.Module, linears: Iterable[str]) -> frozenset[str]:
    """The linears whose missing `.weight` makes transformers' initialisation fail; found by trial, one of each kind.

    transformers also initialises a model after loading it; a reader that holds packed tensors in place of the weight
    then fails, although nothing is left to initialise.
    """
    import torch
    from transformers import PreTrainedModel

    alike: dict[str, list[str]] = defaultdict(list)
    for path in linears:
        alike[re.sub(r"\d+", "#", path)].append(path)
    found: set[str] = set()
    for paths in alike.values():
        steps = paths[0].split(".")
        chain = [model.get_submodule(".".join(steps[:length])) for length in range(len(steps) + 1)]
        parameters, owner = chain[-1]._parameters, cast("Any", model)
        weight = parameters.pop("weight")
        for module in chain:
            owner = module if isinstance(module, PreTrainedModel) else owner
            try:
                with torch.no_grad():
                    owner._init_weights(module)
            except AttributeError as error:
                found.update(paths if "'weight'" in str(error) else ())
            except Exception:  # some initialisations cannot run without data; only a missing weight counts here
                continue
        parameters["weight"] = weight
    return frozenset(found)
