"""Artifacts in the native format: loaded, run, compared with what they mean, and never dense."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
import compress.hf
from compress.checkpoint.reader import open_checkpoint
from compress.context import Context
from compress.errors import CompressError, FormatError, InputError, UsageError
from compress.evaluate.verify import read_with, verify_bytes
from compress.kernels.native.modules import DenseWeight, PackedWeight
from compress.layerwise.dense_view import DenseView
from compress.layerwise.model import build
from compress.runtime import artifact
from families import build as build_family
from support import SHARED, load, logits, run, shared, step_of, tiny_llama

Source = Callable[[str], Path]
NATIVE = "pack(format=native)"
FAMILIES = ["llama", "tied", "gemma3", "falcon", "gpt2", "bert", "t5", "mixtral", "deepseek_v3", "gpt_oss", "llama4", "granitemoe"]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("families")
    return lambda name: folder / name if (folder / name).exists() else build_family(name, folder)


def bytes_of(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, those that are shared counted once."""
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(held.values())


@pytest.mark.parametrize(("name", "recipe"), shared(
    FAMILIES,
    [
        "quantize.rtn(scheme=w4a16g32)",
        "quantize.rtn(scheme=w3a16g32-asym, targets=['linear', 're:.*(embed_tokens|wte|word_embeddings|shared)\\.weight'])",
        "quantize.rtn(scheme=nf4g16, outliers=0.01, targets=attention) | quantize.rtn(scheme=fp8, skip=attention)",
    ],
))  # fmt: skip
def test_it_computes_what_it_means(name: str, recipe: str, source: Source, tmp_path: Path) -> None:
    run(source(name), tmp_path / "out", f"{recipe} | {NATIVE}")
    dense_view = logits(build(open_checkpoint(tmp_path / "out"), rounded=False))
    model = compress.load(tmp_path / "out", "float32")
    # Experts that lie transposed are multiplied so by the dense model, which rounds otherwise.
    torch.testing.assert_close(logits(model), dense_view, rtol=0, atol=5e-6 if name == "gpt_oss" else 0)
    codes = DenseView(open_checkpoint(tmp_path / "out")).weights
    assert sum(artifact.backends(model).values()) == len(codes)
    assert not [n for n, p in model.named_parameters() if p.is_meta]


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_is_that_of_the_file(group: int, dtype: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "num_hidden_layers": 3}
    source = tiny_llama(tmp_path / "model", **sizes)
    run(source, tmp_path / "out", f"quantize.rtn(scheme=w4a16g{group}, targets=[linear, embeddings, head]) | {NATIVE}")
    model = compress.load(tmp_path / "out", dtype)
    stored = open_checkpoint(tmp_path / "out").nbytes
    assert stored < 0.3 * open_checkpoint(source).nbytes
    assert bytes_of(model) < 1.1 * stored
    assert artifact.backends(model) == ({"int4pack": 22, "cpu": 1} if dtype == "bfloat16" else {"cpu": 23})
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert bytes_of(model) < 1.1 * stored


def test_loading_and_running_allocate_no_dense_copy(tmp_path: Path) -> None:
    """Every tensor that comes into being is counted: none is as large as a weight would be in bf16."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 1, "num_key_value_heads": 4}
    run(tiny_llama(tmp_path / "model", **sizes), tmp_path / "out", f"quantize.rtn(scheme=w4a16g128) | {NATIVE}")

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                    self.most = max(self.most, tensor.untyped_storage().nbytes())
            return out

    with Largest() as largest, torch.no_grad():
        model = compress.load(tmp_path / "out")
        model(input_ids=torch.tensor([[1, 2, 3]]))
        compress.load(tmp_path / "out", "float32", backend="cpu")(input_ids=torch.tensor([[1, 2, 3]]))
    assert largest.most <= 2048 * 4096 // 2 + (1 << 16)


@pytest.mark.parametrize("name", ["llama", "mixtral", "tied"])
def test_transformers_loads_it_by_itself(name: str, source: Source, tmp_path: Path) -> None:
    run(source(name), tmp_path / "out", f"quantize.rtn(scheme=w4a16g32) | {NATIVE}", shard_bytes=60_000)
    for file in ("manifest.json", "generation_config.json"):
        (tmp_path / "out" / file).unlink()
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    # Without its manifest it is read by what config.json says.
    assert torch.equal(logits(model), logits(build(open_checkpoint(tmp_path / "out"), rounded=False)))
    assert verify_bytes(open_checkpoint(tmp_path / "out"), Context()).decoded == sum(artifact.backends(model).values())


@pytest.mark.parametrize(("name", "scheme"), shared(
    ["llama", "mixtral"], ["w4a16g32", "w3a16g32", "w2a16g32-asym", "nf4g32", "mxfp4", "fp8"],
))  # fmt: skip
def test_text_is_that_of_the_dense_view(name: str, scheme: str, source: Source, tmp_path: Path) -> None:
    run(source(name), tmp_path / "out", f"quantize.rtn(scheme={scheme}) | {NATIVE}")
    same_text(tmp_path / "out", tmp_path / "dense", torch.tensor([[1, 5, 9, 20]]))


@pytest.mark.parametrize(("name", "scheme"), shared(
    ["stories260k", "tiny-llama-3m", "tiny-mixtral-9m"],
    ["w4a16g32", "w3a16g32-asym", "w2a16g16-asym", "nf4g64", "fp4g32", "fp8"], one_in=3,
))  # fmt: skip
def test_trained_models(name: str, scheme: str, tmp_path: Path) -> None:
    if not (SHARED / "models" / name).is_dir():
        pytest.skip("no trained models beside this checkout")
    run(SHARED / "models" / name, tmp_path / "out", f"quantize.rtn(scheme={scheme}, ragged=channel) | {NATIVE}")
    same_text(tmp_path / "out", tmp_path / "dense", torch.tensor([[1, 300, 40]]))
    model, dense_view = compress.load(tmp_path / "out", "bfloat16"), build(open_checkpoint(tmp_path / "out"), rounded=False)
    found, wanted = logits(model), logits(dense_view)
    assert (found - wanted).norm() < 2e-2 * wanted.norm()


def same_text(packed: Path, dense: Path, ids: torch.Tensor) -> None:
    """Greedy text and logits of an artifact and of the dense fp32 checkpoint that it means."""
    run(packed, dense, "unpack(to=dense)")
    exact = build(open_checkpoint(packed), rounded=False)
    model = compress.load(packed, "float32")
    options = {"max_new_tokens": 24, "do_sample": False}
    text = model.generate(ids, **options)
    assert torch.equal(text, exact.generate(ids, **options))
    torch.testing.assert_close(logits(model), logits(exact), rtol=0, atol=1e-5)
    if not hasattr(model.config, "num_local_experts"):
        # The dense checkpoint has every weight rounded to its dtype, by which a router may choose another expert.
        meant = logits(load(dense, dtype=torch.float32))
        assert (logits(model) - meant).norm() < 1e-2 * meant.norm()


def test_experts_may_differ_and_some_stay_dense(source: Source, tmp_path: Path) -> None:
    recipe = "quantize.rtn(scheme=w2a16g32, targets='re:.*experts\\.[01]\\.w[12].*') | quantize.rtn(scheme=nf4g32, targets='re:.*experts\\.2.*')"
    run(source("mixtral"), tmp_path / "out", f"{recipe} | {NATIVE}")
    model = compress.load(tmp_path / "out", "float32")
    assert torch.equal(logits(model), logits(build(open_checkpoint(tmp_path / "out"), rounded=False)))
    experts = model.get_submodule("model.layers.0.mlp.experts")
    # Gate and up of expert 3, dense, and of expert 2 are one matrix each; of the others only gate is packed.
    weights = experts.packed_weights["gate_up_proj"]
    kinds = [(type(w), len(w.values) if isinstance(w, DenseWeight) else w.work.experts) for w in weights]
    assert sorted(kinds, key=str) == [(DenseWeight, 1), (DenseWeight, 2), (PackedWeight, 1), (PackedWeight, 2)]
    # Whoever asks for the stacked parameter gets what it means.
    dense = build(open_checkpoint(tmp_path / "out"), rounded=False).get_submodule("model.layers.0.mlp.experts")
    for attribute in ("gate_up_proj", "down_proj"):
        assert torch.equal(getattr(experts, attribute), getattr(dense, attribute))


def test_gradients_go_through_to_adapters(source: Source, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    run(source("llama"), tmp_path / "out", f"quantize.rtn(scheme=w4a16g32) | {NATIVE}")
    model = compress.load(tmp_path / "out", "float32")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    ids = torch.randint(3, 128, (2, 8))
    adapted(input_ids=ids, labels=ids).loss.backward()
    learned = [p for n, p in adapted.named_parameters() if p.requires_grad]
    assert len(learned) == 2 * 2 * 2
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in learned)


def test_a_backend_that_is_asked_for_runs_all_or_refuses(source: Source, tmp_path: Path) -> None:
    run(source("llama"), tmp_path / "out", f"quantize.rtn(scheme=w4a16g32-asym) | {NATIVE}")
    assert artifact.backends(compress.load(tmp_path / "out", backend="reference")) == {"reference": 14}
    with pytest.raises(UsageError, match="not in bfloat16"):
        compress.load(tmp_path / "out", "float32", backend="int4pack")
    with pytest.raises(UsageError, match=r"one of .*int4pack, .*cpu, reference"):
        compress.load(tmp_path / "out", backend="gpus")


def test_other_directories_are_refused(source: Source, tmp_path: Path) -> None:
    run(source("llama"), tmp_path / "out", "quantize.rtn(scheme=w4a16g32) | pack")
    for path, said in [(source("llama"), "a dense one"), (tmp_path / "out", r"packed as compressed-tensors\n.*\n*.*repack=True")]:
        with pytest.raises(InputError, match=said):
            compress.load(path)
    with pytest.raises(InputError, match="weights in codes that can be packed"):
        compress.load(source("llama"), repack=True)
    step = step_of(tmp_path / "out", "quantize.rtn")
    with pytest.raises(InputError, match="codes that are not packed"):
        compress.load(step)
    # Its shards have another name, so that transformers does not fill a model with random weights.
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(step)


def test_what_config_json_says_is_checked(source: Source, tmp_path: Path) -> None:
    run(source("llama"), tmp_path / "out", f"quantize.rtn(scheme=w4a16g32) | {NATIVE}")
    config = json.loads((tmp_path / "out" / "config.json").read_text())

    def changed(**told: Any) -> Path:
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        shutil.copytree(tmp_path / "out", tmp_path / "other")
        (tmp_path / "other" / "manifest.json").unlink()
        quantization = {**config["quantization_config"], **told}
        (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        return tmp_path / "other"

    with pytest.raises(InputError, match="version 99 of the native format"):
        compress.load(changed(version=99))
    with pytest.raises(InputError, match="nothing of 14 packed weights"):
        compress.load(changed(weights=[]))
    with pytest.raises(InputError, match="what the native format says of weights"):
        compress.load(changed(weights=[{"names": ["a"]}]))
    # The manifest is there and config.json says another scheme of a weight.
    weights = json.loads(json.dumps(config["quantization_config"]["weights"]).replace("w4a16g32", "nf4g32"))
    shutil.copyfile(tmp_path / "out" / "manifest.json", changed(weights=weights) / "manifest.json")
    with pytest.raises(CompressError):
        verify_bytes(open_checkpoint(tmp_path / "other"), Context())


def test_sizes_are_exact_and_packing_again_gives_the_same_bytes(source: Source, tmp_path: Path) -> None:
    result = run(source("mixtral"), tmp_path / "out", f"quantize.rtn(scheme=w3a16g32-asym) | {NATIVE}")
    files = [f for f in (tmp_path / "out").iterdir() if f.name not in ("manifest.json", "README.md", "generation_config.json")]
    assert sum(file.stat().st_size for file in files) == result.plan.steps[-1].disk_bytes
    run(tmp_path / "out", tmp_path / "again", f"unpack | {NATIVE}")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_verify_runs_it_as_a_reader(source: Source, tmp_path: Path) -> None:
    run(source("llama"), tmp_path / "out", f"quantize.rtn(scheme=w4a16g32) | {NATIVE}")
    reading = read_with("native", tmp_path / "out", torch.randint(3, 128, (2, 16)), lambda line: None)
    assert reading.dtype == "bfloat16"
    assert reading.notes == ("14 weights by the backend simd",)


def test_what_is_split_while_loading_is_refused(source: Source, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="splits or permutes"):
        run(source("gte"), tmp_path / "out", f"quantize.rtn(scheme=w4a16g32) | {NATIVE}")
