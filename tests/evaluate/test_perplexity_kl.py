"""Perplexity and KL, block by block: against whole models in memory, in every state, and with what can be wrong."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from threading import get_ident
from typing import Any

import pytest
import torch

from compress.checkpoint.reader import Checkpoint, open_checkpoint
from compress.errors import CompressError, InputError, UsageError
from compress.evaluate import perplexity_kl
from compress.evaluate.perplexity_kl import Estimate, compare, mean, quantile
from compress.layerwise import eval_windows as windows_module
from compress.layerwise import logits as forward
from compress.layerwise import side_by_side
from compress.layerwise.eval_windows import check_data, token_windows, tokenizer_folder
from compress.layerwise.logits import Forward, _finish
from compress.layerwise.stepwise import Call, ForwardHooks
from compress.threads import compute_threads
from families import build
from support import SHARED, dense_meaning, load, run, step_of, tiny_llama


@pytest.fixture(scope="module")
def text(demo_model: Path) -> Path:
    return demo_model.parent / "text" / "evaluation.jsonl"


@pytest.fixture(scope="module")
def artifact(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("measure") / "out"
    run(demo_model, out, "prune.magnitude(sparsity=0.1) | quantize.rtn(scheme=w3a16g32) | pack")
    return out


@pytest.fixture(scope="module")
def windows(demo_model: Path, text: Path) -> torch.Tensor:
    return token_windows(demo_model, text, 128, 2048)


@torch.no_grad()
def oracle(source: Path, artifact: Path, windows: torch.Tensor) -> dict[str, float]:
    """The same numbers from whole models, in fp64."""
    logs = [load(d, dtype=torch.float32)(windows).logits[:, :-1].double().log_softmax(-1) for d in (source, artifact)]
    p, q = logs
    kl = (p.exp() * (p - q)).sum(-1)
    nll = [-log.gather(-1, windows[:, 1:, None])[..., 0] for log in logs]
    same = (p.argmax(-1) == q.argmax(-1)).double()

    def error(x: torch.Tensor) -> float:
        return float(x.mean(-1).std()) / math.sqrt(len(x))

    return {
        "source_perplexity": math.exp(nll[0].mean()), "perplexity": math.exp(nll[1].mean()),
        "perplexity_error": math.exp(nll[1].mean()) * error(nll[1]), "kl": float(kl.mean()), "kl_error": error(kl),
        "kl_median": float(kl.flatten().quantile(0.5)), "kl_p99": float(kl.flatten().quantile(0.99)),
        "top1": float(same.mean()), "top1_error": error(same),
    }  # fmt: skip


def test_numbers_are_those_of_whole_models(demo_model: Path, artifact: Path, windows: torch.Tensor, tmp_path: Path) -> None:
    found = compare(open_checkpoint(demo_model), open_checkpoint(artifact), windows)
    meant = dense_meaning(step_of(artifact, "quantize.rtn"), tmp_path / "dense_view")
    for name, number in oracle(demo_model, meant, windows).items():
        estimate = getattr(found, name.removesuffix("_error"))
        got = estimate.error if name.endswith("_error") else estimate.value
        assert got == pytest.approx(number, rel=1e-4), name
    assert (found.tokens, found.length, found.scored) == (2048, 128, 16 * 127)
    assert 0 < found.kl_median.error < found.kl.error < found.kl_p99.error < found.kl_p99.value


def test_the_number_that_is_known(tmp_path: Path) -> None:
    folder = SHARED / "models" / "tiny-llama-3m"
    if not folder.is_dir():
        pytest.skip("tiny-llama-3m does not lie beside this checkout")
    found = token_windows(folder, SHARED / "data" / "code.valid.jsonl", 256, 11_776)
    run(folder, tmp_path / "out", "quantize.rtn(scheme=w4a16g32)")
    quality = compare(open_checkpoint(folder), open_checkpoint(tmp_path / "out"), found)
    assert quality.kl.value == pytest.approx(0.0113, abs=5e-5)
    assert quality.source_perplexity.value == pytest.approx(30.53, abs=0.01)


def test_a_model_is_exactly_itself_in_any_state(demo_model: Path, artifact: Path, windows: torch.Tensor, tmp_path: Path) -> None:
    canonical = step_of(artifact, "quantize.rtn")
    states = [artifact, canonical, dense_meaning(canonical, tmp_path / "dense")]
    one, none = Estimate(1.0, 0.0), Estimate(0.0, 0.0)
    for a, b in [(demo_model, demo_model), *itertools.pairwise(states), (states[2], states[0])]:
        found = compare(open_checkpoint(a), open_checkpoint(b), windows)
        assert (found.kl, found.kl_median, found.kl_p99, found.top1) == (none, none, none, one)
        assert found.perplexity == found.source_perplexity
    forth, back = (
        compare(open_checkpoint(a), open_checkpoint(b), windows)
        for a, b in ((demo_model, artifact), (artifact, demo_model))
    )  # fmt: skip
    assert forth.kl != back.kl, "KL has a direction"
    assert (forth.perplexity, forth.top1) == (back.source_perplexity, back.top1)


def test_groups_and_batches_change_nothing(
    demo_model: Path, artifact: Path, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = open_checkpoint(demo_model), open_checkpoint(artifact)
    whole = compare(*sides, windows)
    shares: list[float] = []
    monkeypatch.setattr(side_by_side, "HELD_BYTES", 1)
    monkeypatch.setattr(perplexity_kl, "_CHUNK", 3000)
    parts = compare(*sides, windows, 3, shares.append)
    assert all(later > earlier - 1e-9 for earlier, later in itertools.pairwise(shares))
    assert shares[-1] == 1
    assert len(shares) == 6 * (1 + 2 * 4), "six groups, four blocks of two models"
    for name in ("perplexity", "source_perplexity", "kl", "kl_median", "kl_p99", "top1"):
        a, b = getattr(whole, name), getattr(parts, name)
        assert (a.value, a.error) == pytest.approx((b.value, b.error), rel=1e-4)


@pytest.mark.parametrize(("threads", "own", "windows_in_one"), [(1, 0, 16), (2, 2, 8), (3, 3, 5)])
def test_windows_go_side_by_side_on_the_cores_there_are(
    threads: int, own: int, windows_in_one: int, demo_model: Path, artifact: Path, windows: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sides = open_checkpoint(demo_model), open_checkpoint(artifact)
    with compute_threads(1):
        whole = compare(*sides, windows)
    seen: list[tuple[int, int]] = []

    def finish(hooks: ForwardHooks, call: Call) -> Any:
        seen.append((get_ident(), torch.get_num_threads()))
        assert len(call.args[0]) <= windows_in_one
        time.sleep(0.01)  # so that one worker does not do it all
        return _finish(hooks, call)

    monkeypatch.setattr(forward, "_finish", finish)
    with compute_threads(threads):
        parts = compare(*sides, windows)
        assert torch.get_num_threads() == threads
    others = {ident for ident, _ in seen} - {get_ident()}
    assert (len(others), {number for _, number in seen}) == (own, {1})
    for name in ("perplexity", "source_perplexity", "kl", "kl_median", "kl_p99", "top1"):
        a, b = getattr(whole, name), getattr(parts, name)
        assert (a.value, a.error) == pytest.approx((b.value, b.error), rel=1e-4)


def test_memory_is_a_block_and_the_logits_of_a_batch(
    demo_model: Path, artifact: Path, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Forward(open_checkpoint(artifact))
    model = forward.model
    norms = sum(p.nbytes for path, p in model.named_parameters() if path == "model.norm.weight")
    held: list[int] = []

    def passed() -> None:
        held.append(sum(p.untyped_storage().nbytes() for p in model.parameters() if not p.is_meta))

    with torch.no_grad():
        for logits in forward.logits(list(windows.split(4)), passed):
            assert logits.shape == (4, 128, 1024)
            head = sum(p.untyped_storage().nbytes() for p in model.parameters() if not p.is_meta)
            assert head == norms + 4 + 1024 * 128 * 4, "the head is loaded once, the embedding is gone"
    assert held == [norms + 2 * 4] * 4, "a number stands for the embedding, another for the head"
    monkeypatch.setattr(perplexity_kl, "LOGIT_BYTES", 1)
    shapes: list[torch.Size] = []
    monkeypatch.setattr(
        Forward, "_output", lambda self, journey, of=Forward._output: shapes.append((x := of(self, journey)).shape) or x
    )
    compare(None, open_checkpoint(artifact), windows[:3])
    assert shapes == [(1, 128, 1024)] * 3


def test_one_model_alone(demo_model: Path, artifact: Path, windows: torch.Tensor) -> None:
    alone, both = (
        compare(None, open_checkpoint(artifact), windows),
        compare(open_checkpoint(demo_model), open_checkpoint(artifact), windows),
    )
    assert alone.perplexity == both.perplexity
    assert math.isnan(alone.kl.value)
    single = compare(None, open_checkpoint(artifact), windows[:1])
    assert single.perplexity.value > 1
    assert math.isnan(single.perplexity.error)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Checkpoint, Checkpoint, Path]]:
    folder = tmp_path_factory.mktemp("families")

    def make(name: str) -> tuple[Checkpoint, Checkpoint, Path]:
        if not (folder / name).exists():
            build(name, folder)
            run(folder / name, folder / f"{name}.out", "quantize.rtn(scheme=w4a16g32)")
            dense_meaning(folder / f"{name}.out", folder / f"{name}.dense")
        return open_checkpoint(folder / name), open_checkpoint(folder / f"{name}.out"), folder / f"{name}.dense"

    return make


IDS = torch.randint(3, 128, (5, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["t5", "bert", "gte", "gemma2", "mamba2", "qwen3_moe", "gpt_oss", "llava", "olmo_hybrid"])
@torch.no_grad()
def test_other_kinds_of_models(name: str, family: Callable[[str], tuple[Checkpoint, Checkpoint, Path]]) -> None:
    source, artifact, meant = family(name)
    found = compare(source, artifact, IDS, 2)
    models = [load(source.path, dtype=torch.float32), load(meant, dtype=torch.float32)]
    inputs = {"input_ids": IDS[:, :16], "decoder_input_ids": IDS[:, 16:]} if name == "t5" else {"input_ids": IDS}
    p, q = (model(**inputs).logits.double().log_softmax(-1) for model in models)
    kl = (p.exp() * (p - q)).sum(-1)
    masked = name in ("bert", "gte")
    assert found.kl.value == pytest.approx(float((kl if masked else kl[:, :-1]).mean()), rel=1e-3)
    assert found.scored == (5 * 32 if masked else 5 * (15 if name == "t5" else 31))
    assert math.isnan(found.perplexity.value) == masked
    word = {"t5": "half of a window to the encoder"}.get(name, "no perplexity" if masked else "first token of a window")
    assert word in found.protocol


def broken(demo_model: Path, target: Path, **config: object) -> Path:
    """A copy of the embedded model with another config."""
    import shutil

    shutil.copytree(demo_model, target)
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**content, **config}))
    return target


def with_nan(demo_model: Path, target: Path) -> Path:
    from safetensors.torch import load_file, save_file

    broken(demo_model, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = math.nan
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_nan_names_the_side(demo_model: Path, windows: torch.Tensor, tmp_path: Path) -> None:
    bad, good = open_checkpoint(with_nan(demo_model, tmp_path / "bad")), open_checkpoint(demo_model)
    for pair in ((bad, good), (good, bad), (None, bad)):
        with pytest.raises(InputError, match="NaN") as error:
            compare(*pair, windows)
        assert error.value.problems[0].where == str(tmp_path / "bad")


def test_a_token_that_is_ruled_out_costs_nothing() -> None:
    """Some models give tokens that are no tokens a logit of minus infinity."""
    p, q = torch.randn(2, 6, 9)
    p[:, 0] = q[:, 0] = -math.inf
    found = torch.empty(4, 6)
    perplexity_kl._rows([p, q], torch.ones(6, dtype=torch.long), found)
    logs = [x[:, 1:].log_softmax(-1) for x in (p, q)]
    assert torch.allclose(found[2], (logs[0].exp() * (logs[0] - logs[1])).sum(-1), atol=1e-6)


def message(*sides: Checkpoint | None, ids: torch.Tensor = IDS) -> str:
    with pytest.raises(CompressError) as error:
        compare(sides[0], sides[1], ids)  # type: ignore[arg-type]
    return str(error.value)


def test_what_cannot_be_compared(
    family: Callable[[str], tuple[Checkpoint, Checkpoint, Path]], demo_model: Path, tmp_path: Path
) -> None:
    llama, _, _ = family("llama")
    assert "input_features" in message(llama, family("whisper")[0])
    assert "scored as" in message(llama, family("bert")[0])
    wider = open_checkpoint(tiny_llama(tmp_path / "wider", vocab_size=160))
    assert "a vocabulary of 128" in message(llama, wider)
    assert "the id 159" in message(None, llama, ids=IDS + 32)
    assert "at most 64" in message(None, llama, ids=IDS.repeat(1, 3))
    assert "at least 4" in message(None, family("t5")[0], ids=IDS[:, :3])
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 128}
    LlamaForSequenceClassification(LlamaConfig(**sizes, dtype="float32")).save_pretrained(tmp_path / "classifier")
    assert "no such head" in message(llama, open_checkpoint(tmp_path / "classifier"))
    foreign = broken(demo_model, tmp_path / "gptq", quantization_config={"quant_method": "gptq"})
    assert "quantized by gptq" in message(llama, open_checkpoint(foreign))
    narrow = broken(demo_model, tmp_path / "narrow", intermediate_size=128)
    said = message(open_checkpoint(demo_model), open_checkpoint(narrow))
    assert f"{tmp_path / 'narrow'}: " in said


def test_positions_before_padding_do_not_count(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaForMaskedLM

    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(**sizes, max_position_embeddings=34, pad_token_id=1, dtype="float32")
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    roberta = open_checkpoint(tmp_path / "roberta")
    assert compare(roberta, roberta, IDS).kl == Estimate(0.0, 0.0)
    assert "at most 32" in message(None, roberta, ids=IDS.repeat(1, 2))


def test_errors_are_those_of_windows() -> None:
    """Standard errors against the spread over many draws of windows whose tokens depend on one another."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return (torch.randn(60, 40, generator=generator) + torch.randn(60, 1, generator=generator)).exp()

    draws = [draw() for _ in range(300)]
    for estimate in (mean, lambda x: quantile(x, 0.5), lambda x: quantile(x, 0.99)):
        found = [estimate(x) for x in draws]
        spread = float(torch.tensor([e.value for e in found]).std())
        told = sum(e.error for e in found) / len(found)
        assert told == pytest.approx(spread, rel=0.25)


# texts


def test_a_text_is_its_documents_one_after_the_other(demo_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    texts = ["import os\n", "", "def f(x):\n    return x\n" * 20]
    wanted = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    (tmp_path / "t.jsonl").write_text("\n\n".join(json.dumps({"text": text, "n": 1}) for text in texts))
    (tmp_path / "t.txt").write_text("".join(texts))
    found = token_windows(demo_model, tmp_path / "t.jsonl", 16)
    assert found.flatten().tolist() == wanted[: found.numel()]
    assert len(wanted) - found.numel() < 16
    assert token_windows(demo_model, tmp_path / "t.jsonl", 16, 40).shape == (2, 16)
    plain = tokenizer("".join(texts), add_special_tokens=False)["input_ids"]
    assert token_windows(demo_model, tmp_path / "t.txt", 16).flatten().tolist() == plain[: len(plain) // 16 * 16]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("short.txt", "import os", "2 tokens"),
        ("none.jsonl", '{"txt": "a"}', "'text'"),
        ("number.jsonl", '{"text": 5}', "a number"),
        ("half.jsonl", '{"text": "\\ud800"}', "surrogate"),
        ("broken.jsonl", "{", "JSON"),
        ("data.csv", "a,b", "data"),
        ("x.safetensors", "a,b", "'text'"),
    ],
)
def test_texts_that_cannot_be_used(name: str, content: str, said: str, demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CompressError) as error:
        token_windows(demo_model, tmp_path / name, 16)
    assert said in str(error.value)


def test_too_few_tokens_say_how_many_there_are(demo_model: Path, text: Path) -> None:
    with pytest.raises(InputError, match=r"at least 999,999 tokens\n.*15,\d\d\d tokens\n.*lower tokens"):
        token_windows(demo_model, text, 256, 999_999)
    with pytest.raises(UsageError, match="at least a window of 256"):
        check_data(str(text), 256, 100)


def test_tokenizers_must_agree(demo_model: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, bare = open_checkpoint(demo_model), open_checkpoint(tiny)
    assert tokenizer_folder(None, source) == tokenizer_folder(source, bare) == tokenizer_folder(bare, source) == demo_model
    other = broken(demo_model, tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(windows_module, "Encoder", None)
        assert tokenizer_folder(source, open_checkpoint(other)) == demo_model, "the same files need no loading"
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="some of them others"):
        tokenizer_folder(source, open_checkpoint(other))
