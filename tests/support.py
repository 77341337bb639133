"""What several tests need: tiny models from configs, the dense meaning of a canonical checkpoint, logits."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import demo
from compress.architecture.weight_map import resolve
from compress.checkpoint.manifest import Manifest
from compress.checkpoint.reader import Checkpoint, open_checkpoint, torch_dtype
from compress.checkpoint.writer import Writer
from compress.context import Context
from compress.errors import CompressError, InputError
from compress.evaluate.perplexity_kl import compare
from compress.kernels.dispatch import load_backend
from compress.kernels.native.packed import Packed, pack
from compress.layerwise.dense_view import DenseView
from compress.layerwise.eval_windows import token_windows
from compress.numerics import qtensor
from compress.numerics.grid import round_to_nearest
from compress.numerics.lowrank import Factors
from compress.numerics.rounding import nearest
from compress.pipeline import output_paths
from compress.pipeline.run import Options, Result, run_recipe
from compress.spec.recipe import parse_one_liner
from compress.spec.scheme import Scheme
from compress.spec.weight_state import State, Weight

SHARED = Path(__file__).parents[2] / "shared"
"""Trained models and texts that may lie beside a checkout; tests that use them are skipped without."""

TEXT = Path(demo.__file__).parent / "text"
CALIBRATE = f"calibrate(data='{TEXT / 'calibration.jsonl'}', samples=32, length=256)"
"""Calibration of the embedded model on its own texts."""


def kl(source: Path, artifact: Path) -> float:
    """KL to the source on the embedded model's evaluation text."""
    windows = token_windows(source, TEXT / "evaluation.jsonl", 256, 4096)
    return compare(open_checkpoint(source), open_checkpoint(artifact), windows).kl.value


def run(source: Path | Checkpoint, out: Path, recipe: str, **options: Any) -> Result:
    """Runs a one-liner over a directory, quietly."""
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    return run_recipe(parse_one_liner(recipe), checkpoint, out, Context(threads=2), Options(**options))


def refused(source: Path, out: Path, recipe: str, said: Sequence[str]) -> None:
    """A recipe is refused in words that have these parts, before a byte moves."""
    with pytest.raises(CompressError) as caught:
        run(source, out, recipe)
    for part in said:
        assert part in str(caught.value)
    assert not out.exists()


def do(source: Path, out: Path, recipe: str, **context: Any) -> Result:
    """Runs a one-liner over a directory, in fp32 and on two threads or as the context says."""
    settings = {"threads": 2, "dtype": "float32", **context}
    return run_recipe(parse_one_liner(recipe), open_checkpoint(source), out, Context(**settings))


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, without its calibration tokens."""
    files = [file for file in out.glob("*.safetensors") if file.name != "calibration.safetensors"]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def rows(out: Path) -> list[dict[str, float]]:
    """The record of a training pass, a step each."""
    return [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    """The loss of each step of a training pass."""
    return [row["loss"] for row in rows(out)]


def step_of(out: Path, name: str) -> Path:
    """The directory of a step of `out`, by the name of its pass."""
    return next(path for path in output_paths.steps_folder(out).iterdir() if path.is_dir() and f"-{name}-" in path.name)


def dense_meaning(canonical: Path, target: Path) -> Path:
    """Writes the dense checkpoint that a canonical one means, by QTensor.dequantize and nothing else."""
    source = open_checkpoint(canonical)
    assert source.manifest is not None
    tensors = {}
    for weight in resolve(source).weights:
        state = source.logical[weight.name].state
        parts = {spec.name: source.read(spec.name) for spec in qtensor.specs(weight, state)}
        if state.scheme is None:
            tensors[weight.name] = parts[weight.name]
            continue
        q = qtensor.decode(weight, state, parts)
        dense = qtensor.as_matrix(weight, q.dequantize())
        tensors[weight.name] = dense.to(torch_dtype(weight.dtype)).contiguous()
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    for name in source.side_files:
        shutil.copyfile(canonical / name, target / name)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    (target / "config.json").write_text(json.dumps(config))
    return target


def load(directory: Path, **options: Any) -> torch.nn.Module:
    """The model of a directory by transformers' own loader; refuses one with missing or unexpected tensors."""
    import transformers

    cls = getattr(transformers, json.loads((directory / "config.json").read_text())["architectures"][0])
    model, info = cls.from_pretrained(directory, output_loading_info=True, **options)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["mismatched_keys"], info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, length: int = 24) -> torch.Tensor:
    """Logits [2, length, vocabulary] on fixed token ids (or on fixed features for an audio encoder)."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (2, length), generator=generator)
    if hasattr(model.config, "num_mel_bins"):
        frames = 2 * model.config.max_source_positions
        features = torch.randn(2, model.config.num_mel_bins, frames, generator=generator).to(model.dtype)
        return model(input_features=features, decoder_input_ids=ids).logits.float()
    if model.config.is_encoder_decoder:
        return model(input_ids=ids, decoder_input_ids=ids).logits.float()
    return model(input_ids=ids).logits.float()


def tiny_llama(directory: Path, max_shard_size: str = "5GB", **changes: Any) -> Path:
    """Saves a random Llama (hidden 64, ffn 96, two blocks, vocabulary 128)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "dtype": "bfloat16",
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))
    model.to(getattr(torch, changes.get("dtype", "bfloat16"))).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def page() -> dict[str, Any]:
    """The reader that the page about the native format holds."""
    names: dict[str, Any] = {}
    text = (Path(__file__).parents[1] / "kernels" / "README.md").read_text()
    exec(text.split("```python\n")[1].split("```")[0], names)
    return names


@lru_cache(maxsize=1)
def ready_inputs(samples: int = 6, length: int = 24, vocabulary: int = 128) -> Path:
    """A file of ready model inputs: random token ids, for models without a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    path = Path(tempfile.mkdtemp()) / "ready.safetensors"
    save_file({"input_ids": torch.randint(3, vocabulary, (samples, length), generator=generator)}, path)
    return path


def stop_at_record(monkeypatch: pytest.MonkeyPatch, step: str, number: int) -> None:
    """Interrupts the first run whose step of this name comes to journal its n-th weight; later runs go on."""
    real, calls = Writer.record, [0]

    def record(self: Writer, weight: str, *args: Any) -> None:
        if step in self.path.name:
            calls[0] += 1
            if calls[0] == number:
                raise KeyboardInterrupt
        real(self, weight, *args)

    monkeypatch.setattr(Writer, "record", record)


def goes_on(monkeypatch: pytest.MonkeyPatch, source: Path, folder: Path, recipe: str, step: str, number: int) -> None:
    """Asserts that a run whose step is interrupted at its n-th weight, and which goes on, ends at the bytes of a whole one."""
    do(source, folder / "whole", recipe)
    stop_at_record(monkeypatch, step, number)
    with pytest.raises(KeyboardInterrupt):
        do(source, folder / "out", recipe)
    do(source, folder / "out", recipe)
    assert tree(folder / "out") == tree(folder / "whole")


def tree(directory: Path) -> dict[str, bytes]:
    """Every file of a directory with its bytes; the manifest without what differs from run to run."""
    found = {}
    for path in sorted(directory.iterdir()):
        found[path.name] = path.read_bytes()
        if path.name == "manifest.json":
            content = json.loads(found[path.name])
            content.pop("measured")
            found[path.name] = json.dumps(content).encode()
    return found


def linear(shape: tuple[int, ...] = (64, 96), **changes: Any) -> Weight:
    """A linear of a decoder's block."""
    fields = {
        "name": "m.layers.0.q.weight", "dtype": "BF16", "kind": "linear", "module": "m.layers.0.q", "module_class": "Linear",
        "stack": "decoder", "block": 0,
    }  # fmt: skip
    return Weight(**{**fields, "shape": shape, **changes})


def random_codes(weight: Weight, scheme: Scheme, dtype: torch.dtype = torch.bfloat16, least_zero: int = 0) -> qtensor.QTensor:
    """Random codes, scales of either sign, zero points from `least_zero` on."""
    shape = (weight.rows, scheme.groups(weight.columns))
    scale = round_to_nearest(torch.randn(weight.shape), scheme, dtype).scale * (torch.randint(0, 2, shape) * 2 - 1).to(dtype)
    zero = None if scheme.symmetric else torch.randint(least_zero, scheme.levels, shape, dtype=torch.uint8)
    return qtensor.QTensor(scheme, torch.randint(0, scheme.levels, weight.shape, dtype=torch.uint8), scale, zero)


def in_state(weight: Weight, state: State) -> qtensor.QTensor:
    """A random weight in a state."""
    assert state.scheme is not None
    lead = () if weight.experts is None else (weight.experts,)
    w = torch.randn(*lead, weight.rows, weight.columns).bfloat16()
    q = nearest(w, state.scheme, torch.bfloat16, outliers=state.outliers).q
    if state.lowrank is None:
        return q
    left, right = torch.randn(*lead, weight.rows, state.lowrank.rank), torch.randn(*lead, state.lowrank.rank, weight.columns)
    if not state.lowrank.int8:
        return replace(q, lowrank=Factors(left.bfloat16(), right.bfloat16()))
    scale = torch.rand(*lead, state.lowrank.rank) / 1000
    return replace(q, lowrank=Factors((left * 40).to(torch.int8), (right * 40).to(torch.int8), scale))


def packed_weight(text: str, rows: int, columns: int, experts: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Packed:
    """A random matrix, or a stack of them, in codes of a scheme, as the native format has it."""
    scheme, lead = Scheme.parse(text), () if experts is None else (experts,)
    q = nearest(torch.randn(*lead, rows, columns).to(dtype), scheme, dtype).q
    return Packed(State(scheme), rows, columns, pack(q))


def prepared(backend: str, packed: Packed) -> Packed:
    """What a backend keeps of a weight."""
    return replace(packed, parts=load_backend(backend).prepare(packed))


def each_is_refused(
    cut: dict[str, dict[str, torch.Tensor | None]],
    whole: dict[str, torch.Tensor],
    out: Path,
    name: str,
    manifest: Manifest | None,
) -> None:
    """Puts `whole` into `out` with each of these changes, None for a tensor that is gone: `name` is then refused by its name.

    With a manifest, its digests are of the tensors that are left.
    """
    for case, changes in cut.items():
        left = {n: t for n, t in (whole | changes).items() if t is not None}
        save_file(left, out / "model.safetensors", {"format": "pt"})
        if manifest is not None:
            digests = {n: d for n, d in manifest.digests.items() if n in left}
            (out / "manifest.json").write_text(manifest.model_copy(update={"digests": digests}).sealed().to_text())
        with pytest.raises(InputError) as error:
            DenseView(open_checkpoint(out)).dense(name)
        assert name in str(error.value), case


def few(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Every value, those that are not kept as slow."""
    return [pytest.param(value, marks=[pytest.mark.slow] * (value not in kept)) for value in values]


def shared(*axes: list[Any], one_in: int = 2) -> list[Any]:
    """All combinations, all but one in so many as slow: each value meets as many of each other axis, as squares of a colour do."""
    places = itertools.product(*(range(len(axis)) for axis in axes))
    return [
        pytest.param(
            *(axis[at] for axis, at in zip(axes, place, strict=True)), marks=[pytest.mark.slow] * bool(sum(place) % one_in)
        )
        for place in places
    ]
