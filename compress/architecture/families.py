"""Families: which weights read and write an activation, by model family.

Which weights read an activation can be observed in a forward; which weight writes it, and through what, cannot. A space is an
activation whose channels can be rescaled without changing the model: each channel is divided by a number where it is written,
and multiplied by it where it is read. This table names the spaces of families whose code was read. The writer must be linear
in its rows (a norm's weight, a linear, one half of a gated product), and what lies between must commute with a scale
(attention's mean of values, a product, a ReLU). That the table names every reader of a space is checked in a forward.

    attention.in    a norm -> query, key, value
    attention.out   the values, head by head -> the output projection; query heads that share a value head share its scales
    mlp.in          a norm -> gate and up; of every expert and of the router where there are experts
    mlp.out         up, or the linear before a ReLU -> down; in each expert by itself
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from compress.errors import InputError
from compress.spec.weight_state import Note, Weight, counted

if TYPE_CHECKING:
    import torch


class _Rule(NamedTuple):
    """A space by paths inside a block; `*` is an expert's number. Readers that a block does not have are ignored."""

    name: str
    writer: str
    readers: tuple[str, ...]
    how: Literal["norm", "norm+1", "rows"] = "norm"
    part: Literal["", "value", "half"] = ""
    """Which of the writer's rows: all, the last ones that are values, or the second half."""
    why: str = ""
    """Why no scale can be folded into a writer; empty where there is a writer."""


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_VALUES = _Rule("attention.out", "self_attn.v_proj", ("self_attn.o_proj",), "rows")
_ROUTED = ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
_SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate")
_GELU = "a GELU between its writer and it does not scale along"


def _gated(
    how: Literal["norm", "norm+1"] = "norm", norm: str = "post_attention_layernorm", more: tuple[str, ...] = ()
) -> tuple[_Rule, ...]:
    """The rules of a block of Llama's kind; `more` are further readers of the gate's input."""
    return (
        _Rule("attention.in", "input_layernorm", _QKV, how),
        _VALUES,
        _Rule("mlp.in", norm, ("mlp.gate_proj", "mlp.up_proj", *more), how),
        _Rule("mlp.out", "mlp.up_proj", ("mlp.down_proj",), "rows"),
        _Rule("mlp.out", "mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",), "rows"),
        _Rule("mlp.out", "mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",), "rows"),
    )


_FAMILIES: dict[str, tuple[_Rule, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "granite"), _gated()),
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe"), _gated(more=_ROUTED)),
    "qwen2_moe": _gated(more=(*_ROUTED, *_SHARED)),
    "gemma": _gated("norm+1"),
    **dict.fromkeys(("gemma2", "gemma3_text"), _gated("norm+1", "pre_feedforward_layernorm")),
    "phi3": (
        _Rule("attention.in", "input_layernorm", ("self_attn.qkv_proj",)),
        _Rule("attention.out", "self_attn.qkv_proj", ("self_attn.o_proj",), "rows", "value"),
        _Rule("mlp.in", "post_attention_layernorm", ("mlp.gate_up_proj",)),
        _Rule("mlp.out", "mlp.gate_up_proj", ("mlp.down_proj",), "rows", "half"),
    ),
    "gpt_oss": (
        _Rule("attention.in", "input_layernorm", _QKV),
        _VALUES,
        _Rule("mlp.in", "post_attention_layernorm", ("mlp.router", "mlp.experts.gate_up_proj")),
        _Rule("mlp.out", "", ("mlp.experts.down_proj",), why="clamps and a one added to up do not scale along"),
    ),
    "gpt2": (
        _Rule("attention.in", "ln_1", ("attn.c_attn",)),
        _Rule("attention.out", "attn.c_attn", ("attn.c_proj",), "rows", "value"),
        _Rule("mlp.in", "ln_2", ("mlp.c_fc",)),
        _Rule("mlp.out", "", ("mlp.c_proj",), why=_GELU),
    ),
    "opt": (
        _Rule("attention.in", "self_attn_layer_norm", _QKV),
        _Rule("attention.out", "self_attn.v_proj", ("self_attn.out_proj",), "rows"),
        _Rule("mlp.in", "final_layer_norm", ("fc1",)),
        _Rule("mlp.out", "fc1", ("fc2",), "rows"),
    ),
    "gpt_neox": (
        _Rule("attention.in", "input_layernorm", ("attention.query_key_value",)),
        _Rule("attention.out", "", ("attention.dense",), why="its values are written between queries and keys, head by head"),
        _Rule("mlp.in", "post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        _Rule("mlp.out", "", ("mlp.dense_4h_to_h",), why=_GELU),
    ),
}


@dataclass(frozen=True)
class Space:
    """One activation of one block, whose `width` channels can be rescaled."""

    name: str
    block: str
    how: Literal["norm", "norm+1", "rows"]
    """A norm's weight, one that stands for itself plus one, or rows of a linear."""
    writer: Weight
    bias: Weight | None
    """The writer's bias, which is divided as its weight is."""
    readers: tuple[Weight, ...]
    first_row: int
    """The first of the writer's rows that write this space; they are its last ones."""
    width: int
    repeats: int
    """Query heads that read one head of values."""
    head: int
    """Channels of a head, or all of them."""
    expert: int | None

    @property
    def weights(self) -> list[Weight]:
        """The writer, its bias and the readers: all that is rescaled."""
        return [self.writer, *([self.bias] if self.bias else []), *self.readers]

    def spread(self, channels: torch.Tensor) -> torch.Tensor:
        """Repeats scales of channels [width] for every input of a reader [width * repeats]."""
        return channels.view(-1, 1, self.head).expand(-1, self.repeats, -1).reshape(-1)

    def by_head(self, inputs: torch.Tensor) -> torch.Tensor:
        """Reshapes numbers of a reader's inputs [width * repeats] to [heads, repeats, channels of a head]."""
        return inputs.view(-1, self.repeats, self.head)


@dataclass(frozen=True)
class Layout:
    """The spaces of a model that are to be rescaled."""

    spaces: tuple[Space, ...]
    wanted: frozenset[str]
    """The readers that the pass targets."""
    left: Mapping[str, str]
    """Targeted readers whose inputs cannot be rescaled: name -> reason."""

    @property
    def weights(self) -> list[Weight]:
        """Every weight that is rescaled, once."""
        return list({weight.name: weight for space in self.spaces for weight in space.weights}.values())

    @property
    def notes(self) -> list[Note]:
        """Counted lines for the manifest."""
        done = "rescaled with all that reads or writes the same activations, which keeps the function"
        return [*counted("smoothed", dict.fromkeys((w.name for w in self.weights), done)), *counted("not smoothed", self.left)]

    def within(self, names: set[str]) -> Layout:
        """Only spaces all of whose weights are in `names`."""
        whole = [all(weight.name in names for weight in space.weights) for space in self.spaces]
        kept = tuple(space for space, all_there in zip(self.spaces, whole, strict=True) if all_there)
        torn = [space for space, all_there in zip(self.spaces, whole, strict=True) if not all_there]
        lost = [reader.name for space in torn for reader in space.readers if reader.name in names]
        return replace(self, spaces=kept, left={**self.left, **dict.fromkeys(lost, "something that shares its space is skipped")})


def layout(weights: Sequence[Weight], family: str, config: dict[str, Any], wanted: frozenset[str]) -> Layout:
    """The spaces that weights in `wanted` read. Raises InputError for a family that is not in the table."""
    rules = _FAMILIES.get(family)
    if rules is None:
        expected = f"a family whose writers are known here: {', '.join(sorted(_FAMILIES))}"
        raise InputError(f"model_type '{family}'", expected, "another one: what norms and products write is not in the table",
                         "quantize without smoothing; quantize.gptq needs no such table")  # fmt: skip
    text = config.get("text_config") or config
    if family == "opt" and not text.get("do_layer_norm_before", True):
        raise InputError("do_layer_norm_before", "norms before attention and MLP", "norms that the residual stream reads as well",
                         "quantize without smoothing")  # fmt: skip
    if family == "opt" and text.get("activation_function", "relu") != "relu":
        rules = (*rules[:-1], _Rule("mlp.out", "", ("fc2",), why=f"a {text['activation_function']} does not scale along"))
    blocks: dict[str, dict[str, Weight]] = {}
    for weight in weights:
        if weight.block is not None and not weight.stack.startswith("tower:"):
            block, place = place_of(weight)
            blocks.setdefault(block, {})[place] = weight
    # Without num_key_value_heads there are as many heads of values as of queries.
    head = int(text.get("head_dim") or text.get("hidden_size", 0) // text.get("num_attention_heads", 1))
    spaces, left = [], {w.name: "the table knows no space that it reads" for w in weights if w.name in wanted}
    for block, places in blocks.items():
        for rule in rules:
            for space, readers in _found(rule, block, places, head):
                asked = [reader.name for reader in readers if reader.name in wanted]
                for name in asked:
                    left.pop(name, None)
                if space is not None and asked:
                    spaces.append(space)
                elif asked:
                    left.update(dict.fromkeys(asked, rule.why or "its inputs are not what its writer has as outputs"))
    return Layout(tuple(spaces), wanted, left)


def place_of(weight: Weight) -> tuple[str, str]:
    """(path of the block, path inside it); experts that are separate tensors get Llama's names, with their number."""
    match = re.match(r"(.*?\.\d+)\.(.+)", weight.module)
    assert match is not None, weight.module
    block, inside = match.groups()
    if weight.kind == "expert" and (alone := re.search(r"experts\.(\d+)\.(\w+)\.weight$", weight.name)):
        word = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(alone[2], alone[2])
        return block, f"{inside}.{alone[1]}.{word}"
    return block, inside if weight.attribute == "weight" else f"{inside}.{weight.attribute}"


def _found(rule: _Rule, block: str, places: dict[str, Weight], head: int) -> list[tuple[Space | None, list[Weight]]]:
    """The spaces of a rule in a block, each with its readers; None for a space that cannot be rescaled."""
    paths = re.compile("|".join(re.escape(path).replace(r"\*", r"(\d+)") for path in rule.readers))
    # A space of each expert where an expert writes it, else one for all that read it.
    readers: dict[int | None, list[Weight]] = {}
    for place, weight in places.items():
        if match := paths.fullmatch(place):
            expert = int(match[match.lastindex or 0]) if "*" in rule.writer else None
            readers.setdefault(expert, []).append(weight)
    return [
        (_space(rule, block, places, readers[expert], head, expert), readers[expert])
        for expert in sorted(readers, key=lambda number: number or 0)
    ]


def _space(
    rule: _Rule, block: str, places: dict[str, Weight], readers: list[Weight], head: int, expert: int | None
) -> Space | None:
    path = rule.writer.replace("*", str(expert))
    writer, bias, inputs = places.get(path), places.get(f"{path}.bias"), readers[0].in_features
    if writer is None:
        return None
    outputs = writer.out_features if rule.how == "rows" else writer.numel
    # Queries have as many outputs as the reader has inputs, keys as many as values.
    width = {"": outputs, "value": (outputs - inputs) // 2, "half": outputs // 2}[rule.part]
    if inputs % width or (inputs != width and not (rule.name == "attention.out" and head)):
        return None
    return Space(
        rule.name, block, rule.how, writer, bias, tuple(readers), outputs - width, width, inputs // width,
        head if inputs != width else width, expert,
    )  # fmt: skip
