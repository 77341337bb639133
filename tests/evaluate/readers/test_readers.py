"""Readers: what others' code reads from an artifact is what the format's oracle says, and their refusals are told."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.errors import FormatError, InputError, MachineError, UsageError
from compress.evaluate import readers
from compress.evaluate.readers.environment import clean_variables, ensure

VOCABULARY, HIDDEN, INTERMEDIATE, LENGTH = 128, 64, 96, 24
IDS = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(5))


def quiet(line: str) -> None:
    pass


def dense_llama(folder: Path, theta: float = 5000.0) -> Any:
    """A Llama with a rope that is not the default, saved by the transformers that runs here."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    return model


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def test_transformers_and_we_read_a_dense_model(tmp_path: Path) -> None:
    model = dense_llama(tmp_path / "dense")
    told: list[str] = []
    before = sorted((f.name, f.stat().st_mtime_ns) for f in (tmp_path / "dense").iterdir())
    theirs = readers.logits("transformers", tmp_path / "dense", IDS, told.append)
    ours = readers.logits("ours", tmp_path / "dense", IDS, told.append)
    assert torch.allclose(theirs.logits, logits_of(model), atol=1e-5)
    assert torch.allclose(ours.logits, logits_of(model), atol=1e-5)
    assert theirs.versions["transformers"] == transformers.__version__
    assert told == ["transformers reads dense"]
    assert sorted((f.name, f.stat().st_mtime_ns) for f in (tmp_path / "dense").iterdir()) == before


@pytest.mark.usefixtures("warm")
def test_a_reader_that_would_fill_in_random_weights_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    dense_llama(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(FormatError, match=r"missing keys: model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        readers.logits("transformers", tmp_path / "dense", IDS, quiet)
    log = tmp_path / "cache" / "readers" / "transformers.last-failure.log"
    assert str(log) in str(caught.value)
    assert "Traceback" in log.read_text()


def test_a_reader_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    dense_llama(tmp_path / "dense")
    with pytest.raises(FormatError, match="nothing in time"):
        readers.logits("transformers", tmp_path / "dense", IDS, quiet, timeout_seconds=0.2)


def test_what_cannot_be_asked_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="did you mean 'auto-gptq'"):
        readers.logits("autogptq", tmp_path, IDS, quiet)
    with pytest.raises(InputError, match=r"config\.json"):
        readers.logits("transformers", tmp_path, IDS, quiet)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="base model"):
        readers.logits("peft", tmp_path, IDS, quiet)
    (tmp_path / "config.json").write_text("{}")
    absent = replace(readers.READERS["transformers"], modules=("not_there_at_all",))
    monkeypatch.setitem(readers.READERS, "transformers", absent)
    with pytest.raises(MachineError, match="not_there_at_all"):
        readers.logits("transformers", tmp_path, IDS, quiet)


@pytest.mark.usefixtures("warm")
def test_peft_reads_an_adapter_on_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    model = dense_llama(tmp_path / "dense")
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    found = readers.logits("peft", tmp_path / "adapter", IDS, quiet, base=tmp_path / "dense")
    assert torch.allclose(found.logits, logits_of(adapted), atol=1e-5)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lost.lora_A.weight"] = tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)
    with pytest.raises(FormatError, match=r"not read: base_model\.model\.lost"):
        readers.logits("peft", tmp_path / "adapter", IDS, quiet, base=tmp_path / "dense")


def given_codes(model: Any, bits: int, group: int, folder: Path) -> None:
    """Gives every linear of the blocks weights that codes mean, and writes down their scales and zeros."""
    random, given = torch.Generator().manual_seed(bits), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            rows, columns = module.weight.shape
            groups = math.ceil(columns / group)
            codes = torch.randint(0, 2**bits, (rows, columns), generator=random)
            # A zero of 0 has no representation in this layout.
            zeros = torch.randint(1, 2**bits, (rows, groups), generator=random).float()
            scales = (torch.rand(rows, groups, generator=random) * 0.5 / 2**bits + 0.01).half().float()
            at = torch.arange(columns) // group
            module.weight.data = scales[:, at] * (codes - zeros[:, at])
            given |= {f"{name}.scales": scales, f"{name}.zeros": zeros}
    save_file(given, folder / "given.safetensors")


def values(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The slow truth: value i of a stream of int32 words [words, n] is bits [i*bits, (i+1)*bits) -> [count, n]."""
    out = torch.zeros(count, words.shape[1], dtype=torch.int64)
    for i in range(count):
        for bit in range(bits):
            at = i * bits + bit
            out[i] |= ((words[at // 32].long() >> (at % 32)) & 1) << bit
    return out


def slow_dense(tensors: dict[str, torch.Tensor], name: str, bits: int, group: int) -> torch.Tensor:
    """scale * (code - zero), where the stored zero is one less: [out, in]."""
    scales = tensors[f"{name}.scales"].float()
    columns, rows = tensors[f"{name}.qweight"].shape[0] * 32 // bits, scales.shape[1]
    codes = values(tensors[f"{name}.qweight"], bits, columns)
    zeros = values(tensors[f"{name}.qzeros"].T, bits, rows).T + 1
    at = torch.arange(columns) // group
    return (scales[at] * (codes - zeros[at])).T


@pytest.fixture(scope="module")
def auto_gptq() -> Path:
    """The interpreter of the real environment, from the user's cache: it takes minutes to build."""
    return ensure(readers.auto_gptq(), print)


def made_by_auto_gptq(python: Path, folder: Path, bits: int, group: int) -> Any:
    """An artifact that AutoGPTQ has packed, under `folder / 'gptq'`; our dense model of the same weights."""
    model = dense_llama(folder / "dense")
    given_codes(model, bits, group, folder)
    model.save_pretrained(folder / "dense")
    config = json.loads((folder / "dense" / "config.json").read_text())
    old = {**config, "rope_theta": config["rope_parameters"]["rope_theta"], "torch_dtype": "float32"}
    del old["rope_parameters"]
    shutil.copytree(folder / "dense", folder / "old")
    (folder / "old" / "config.json").write_text(json.dumps(old))
    script = Path(__file__).with_name("make_auto_gptq.py")
    command = [python, "-P", script, folder / "old", folder / "given.safetensors", folder / "gptq", str(bits), str(group)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_variables(HF_HUB_OFFLINE="1"))
    assert done.returncode == 0, done.stderr
    # As a writer of today leaves it: a config.json of transformers 5.
    (folder / "gptq" / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_auto_gptq_reads_what_auto_gptq_packed(auto_gptq: Path, tmp_path: Path, bits: int) -> None:
    group = 32
    model = made_by_auto_gptq(auto_gptq, tmp_path, bits, group)
    config = (tmp_path / "gptq" / "config.json").read_bytes()
    (file,) = (tmp_path / "gptq").glob("*.safetensors")
    tensors = load_file(file)
    for name, module in model.named_modules():
        if f"{name}.qweight" in tensors:
            dense = slow_dense(tensors, name, bits, group)
            assert torch.equal(dense, module.weight.data), name
    found = readers.logits("auto-gptq", tmp_path / "gptq", IDS, quiet)
    expected = logits_of(model)
    assert expected.std() > 0.1
    assert torch.allclose(found.logits, expected, atol=2e-5), (found.logits - expected).abs().max()
    assert {"auto-gptq": "0.7.1", "transformers": "4.46.3", "peft": "0.13.2"}.items() <= found.versions.items()
    assert "config.json for transformers 4.46: rope_parameters.rope_theta is rope_theta" in found.notes
    assert (tmp_path / "gptq" / "config.json").read_bytes() == config
    # Read as dense: the names are others, and it would have stayed random.
    tensors.pop("model.layers.0.mlp.up_proj.qzeros")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(FormatError, match=r"up_proj\.qzeros"):
        readers.logits("auto-gptq", tmp_path / "gptq", IDS, quiet)


@pytest.mark.usefixtures("warm")
def test_peft_reads_an_adapter_as_we_do(tmp_path: Path) -> None:
    """Alphas of their own, and an adapter that changes the logits."""
    from peft import LoraConfig, get_peft_model

    from compress.evaluate.verify import read_with

    base = dense_llama(tmp_path / "base")
    before = logits_of(base)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], alpha_pattern={"down_proj": 3}))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    found = read_with("peft", tmp_path / "adapter", IDS, quiet, tmp_path / "base")
    assert found.equal
    ours = readers.logits("ours", tmp_path / "adapter", IDS, quiet, tmp_path / "base")
    assert float((ours.logits - before).abs().max()) > 0.05
    with pytest.raises(InputError, match="base model"):
        readers.logits("peft", tmp_path / "adapter", IDS, quiet)
