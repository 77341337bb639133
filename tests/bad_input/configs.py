"""config.json that is missing, contradicts the tensors, or asks for too much."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_input.bench import Case

FILE = "config.json"
_GONE = object()


def change(**values: Any) -> Callable[[Path], object]:
    """Other values of some keys."""

    def spoil(model: Path) -> None:
        content = {**json.loads((model / FILE).read_text()), **values}
        (model / FILE).write_text(json.dumps({key: value for key, value in content.items() if value is not _GONE}))

    return spoil


def text(content: str | bytes) -> Callable[[Path], object]:
    """Another content of the file."""
    return lambda model: (model / FILE).write_bytes(content if isinstance(content, bytes) else content.encode())


def code(model: Path) -> None:
    (model / "modeling_evil.py").write_text("open('/tmp/compress-ran-code', 'w')")
    change(model_type="evil", auto_map={"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"})(
        model
    )


def twice(model: Path) -> None:
    content = (model / FILE).read_text()
    (model / FILE).write_text(content.replace("{", '{"hidden_size": 4096,', 1))


def _case(said: tuple[str, ...], spoil: Callable[[Path], object]) -> Case:
    return Case(3, said, spoil=spoil)


CASES = {
    "missing": _case(("the model's config.json", "no such file"), lambda m: (m / FILE).unlink()),
    "no JSON": _case(("a JSON object",), text("model_type: llama")),
    "cut": _case(("a JSON object",), text('{"model_type": "lla')),
    "a list": _case(("a JSON object", "list"), text("[]")),
    "not UTF-8": _case(("a JSON object", "utf-8"), text(b'{"model_type": "\xff"}')),
    "a key twice": _case(("a JSON object", "'hidden_size' occurs twice"), twice),
    "half a character": _case(("a JSON object", "surrogates"), change(note="\ud800")),
    "deeply nested": _case(("a JSON object", "nested more than 100 levels"), text('{"a":' * 100_000)),
    "no model_type": _case(("a model_type that transformers knows", "'None'"), change(model_type=_GONE)),
    "unknown model_type": _case(("a model_type that transformers knows", "'lama' (did you mean 'llama'?)"), change(model_type="lama")),
    "a list for a model_type": _case(("a model_type that transformers knows",), change(model_type=["llama"])),
    "remote code": _case(("a model_type that transformers knows", "'evil'"), code),
    "an architecture of another type": _case(("architectures: one of", "'GPT2LMHeadModel'"), change(architectures=["GPT2LMHeadModel"])),
    "an architecture that is no model": _case(("architectures: one of", "'os.system'"), change(architectures=["os.system"])),
    "architectures of a strange kind": _case(("architectures: one of",), change(architectures={"a": 1})),
    "sizes of another model": _case(("by config.json",), change(hidden_size=128)),
    "another number of layers": _case(("model.layers.2.",), change(num_hidden_layers=3)),
    "a hidden size that heads do not divide": _case(("a valid config of 'llama'",), change(hidden_size=65)),
    "hidden_size 10^12": _case(("shape [128, 1000000000000] by config.json", "[128, 64]"), change(hidden_size=10**12)),
    "intermediate_size 10^30": _case(("sizes that fit together",), change(intermediate_size=10**30)),
    "vocab_size 10^18": _case(("sizes that fit together",), change(vocab_size=10**18)),
    "10^9 layers": _case(("num_hidden_layers of at most 2000",), change(num_hidden_layers=10**9)),
    "10^9 layers of a type that lists them": _case(("num_hidden_layers of at most 2000",), change(model_type="qwen2", architectures=["Qwen2ForCausalLM"], num_hidden_layers=10**9)),
    "10^9 layers under another name": _case(("n_layer of at most 2000",), change(model_type="gpt2", architectures=["GPT2LMHeadModel"], n_layer=10**9)),
    "10^9 layers of an encoder": _case(("num_layers of at most 2000",), change(model_type="t5", architectures=["T5ForConditionalGeneration"], num_layers=10**9)),
    "10^9 experts": _case(("mlp.gate.weight", "a tensor for it on disk", "none"), change(model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=10**9)),
    "10^9 positions": _case(("a tensor for it on disk", "none"), change(model_type="gpt2", architectures=["GPT2LMHeadModel"], n_positions=10**9)),
    "negative layers": _case(("num_hidden_layers from 1", "-1"), change(num_hidden_layers=-1)),
    "no layers": _case(("num_hidden_layers from 1",), change(num_hidden_layers=0)),
    "negative hidden size": _case(("sizes that fit together", "-64"), change(hidden_size=-64)),
    "no heads": _case(("a valid config of 'llama'",), change(num_attention_heads=0)),
    "NaN for a size": _case(("a valid config of 'llama'", "'hidden_size'"), change(hidden_size=float("nan"))),
    "infinite layers": _case((), change(num_hidden_layers=float("inf"))),
    "text for a size": _case(("a valid config of 'llama'", "'hidden_size'"), change(hidden_size="64")),
    "a list for a size": _case(("a valid config of 'llama'", "'num_hidden_layers'"), change(num_hidden_layers=[2])),
    "null for a size": _case(("a valid config of 'llama'", "'num_hidden_layers'"), change(num_hidden_layers=None)),
    "an unknown activation": _case(("sizes that fit together", "__import__('os')"), change(hidden_act="__import__('os')")),
    "a strange dtype": _case(("a valid config of 'llama'", "bfloat17"), change(dtype="bfloat17")),
    "another dtype": _case(("dtype", "--allow-dtype-mismatch"), change(dtype="float32")),
    "quantized by another tool": _case(("a dense or canonical checkpoint", "already quantized (gptq)", "begin with unpack"), change(quantization_config={"quant_method": "gptq"})),
    "a list for quantization_config": _case(("an object in quantization_config", "list"), change(quantization_config=[1])),
}  # fmt: skip
