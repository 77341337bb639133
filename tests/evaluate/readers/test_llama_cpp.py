"""llama.cpp itself reads what is packed: every architecture and type, and its tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress.checkpoint.reader import GGUF_FILE, open_checkpoint
from compress.errors import FormatError
from compress.evaluate import readers
from compress.evaluate.verify import Reading, read_with, token_ids
from compress.spec.gguf_keys import RULES, WHOLE_WORDS
from families import GGUF, build_gguf
from support import SHARED, TEXT, run, tiny_llama

pytestmark = pytest.mark.slow


def read(artifact: Path) -> Reading:
    return read_with("llama.cpp", artifact, token_ids(open_checkpoint(artifact)), print)


@pytest.mark.parametrize("name", GGUF)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    """Dense weights differ by the rounding of activations to bf16 alone; codes by that to 8 bits."""
    source = build_gguf(name, tmp_path)
    run(source, tmp_path / "dense", "pack(format=gguf)")
    assert read(tmp_path / "dense").typical < 0.015
    run(source, tmp_path / "codes", "quantize.rtn(scheme=w4a16g32) | pack(format=gguf)")
    assert read(tmp_path / "codes").equal


@pytest.mark.parametrize(
    "scheme", ["w4a16g64", "w5a16g32", "w8a16g32", "w8a16", "w4a16g32-min", "w5a16g64-min", "iq4_nl", "mxfp4", "nvfp4"]
)
def test_every_type(scheme: str, demo_model: Path, tmp_path: Path) -> None:
    targets = ", targets=[linear, embeddings]" if scheme.startswith("w8") else ""
    run(demo_model, tmp_path / "out", f"quantize.rtn(scheme={scheme}{targets}) | pack(format=gguf)")
    found = read(tmp_path / "out")
    assert found.equal
    assert found.top1 > 0.95
    assert any("that tokenizer.json has" in note for note in found.notes)


@pytest.mark.parametrize("scheme", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_every_k_quant(scheme: str, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "m", hidden_size=256, intermediate_size=512)
    run(source, tmp_path / "out", f"quantize.rtn(scheme={scheme}, targets=[linear, embeddings]) | pack(format=gguf)")
    assert read(tmp_path / "out").equal


@pytest.mark.parametrize("name", ["mistral", "mixtral", "qwen3", "qwen3_moe"])
def test_a_matrix_is_multiplied_by_its_number(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every architecture that is said to do so; elsewhere llama.cpp reads other weights, without a word."""
    base, more = GGUF[name]
    sizes = dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 128)
    monkeypatch.setitem(GGUF, name, (base, {**more, **sizes}))
    targets = "[linear, experts]" if "mix" in name or "moe" in name else "[linear]"
    source = build_gguf(name, tmp_path)
    run(source, tmp_path / "out", f"quantize.rtn(scheme=nvfp4, targets={targets}) | pack(format=gguf)")
    assert read(tmp_path / "out").equal


def test_a_file_that_it_does_not_load(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out", "pack(format=gguf)")
    (tmp_path / "out" / "manifest.json").unlink()
    data = (tmp_path / "out" / GGUF_FILE).read_bytes()
    (tmp_path / "out" / GGUF_FILE).write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xp.weight"))
    with pytest.raises(FormatError, match=r"it does not load the file: .*blk\.1\.ffn_up\.weight"):
        readers.logits("llama.cpp", tmp_path / "out", torch.ones(1, 4, dtype=torch.int64), print)


@pytest.mark.parametrize("rule", [*RULES, "gpt-2", "smollm"])
def test_it_splits_text_as_tokenizer_json_does(rule: str, tmp_path: Path) -> None:
    """A tokenizer of each rule, trained here; the reader compares a text of blanks, digits, cases and scripts."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=rule in WHOLE_WORDS))
    parts = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule not in RULES)]
    if rule in RULES:
        parts.insert(0, pre_tokenizers.Split(Regex(RULES[rule]), "isolated"))
    elif rule == "smollm":
        parts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [json.loads(line)["text"] for line in (TEXT / "calibration.jsonl").read_text().splitlines()[:300]]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    source = tiny_llama(tmp_path / "m", vocab_size=tokenizer.get_vocab_size())
    tokenizer.save(str(source / "tokenizer.json"))
    run(source, tmp_path / "out", "pack(format=gguf)")
    assert any("that tokenizer.json has" in note for note in read(tmp_path / "out").notes)
    content = json.loads((source / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "out" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"into other tokens than tokenizer\.json"):
        read(tmp_path / "out")


@pytest.mark.parametrize("name", ["stories260k", "tiny-llama-3m", "tiny-mixtral-9m"])
def test_trained_models(name: str, tmp_path: Path) -> None:
    """Among them a tokenizer of SentencePiece."""
    source = SHARED / "models" / name
    if not source.is_dir():
        pytest.skip("no trained models beside this checkout")
    skip = ", skip=['re:.*down_proj.*']" if name == "stories260k" else ""
    run(source, tmp_path / "out", f"quantize.rtn(scheme=w8a16g32{skip}) | pack(format=gguf)")
    found = read(tmp_path / "out")
    assert found.equal
    assert found.top1 > 0.9
