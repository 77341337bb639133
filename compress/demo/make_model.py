"""Make model: trains the tiny Llama that ships, and cuts its texts.

All text is the running CPython's own (PSF-2.0): its ``*.py`` library and the reference
topics that ``pydoc`` carries. No network, no GPU; about 20 minutes on two idle cores.
Writes ``DIR/model`` (checkpoint, tokenizer, README) and ``DIR/text``:

    python -m compress.demo.make_model [--out DIR] [--steps N] [--seed N]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

BOS, EOS, BOS_ID, EOS_ID = "<s>", "</s>", 0, 1
VOCAB_SIZE, WINDOW = 1024, 256
TEXT_BYTES, EXCERPT_BYTES = 48_000, 6_000  # of each shipped text, of one document in it
# Character tables (encodings, stringprep) would be a seventh of the corpus and teach nothing;
# _sysconfigdata* names paths of the build machine; topics.py is read as its topics instead.
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "stringprep.py", "topics.py"}
CONFIG = LlamaConfig(
    vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=4, head_dim=16, max_position_embeddings=512,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=True,
    bos_token_id=BOS_ID, eos_token_id=EOS_ID, initializer_range=0.04,
)  # fmt: skip


class Recipe(NamedTuple):
    """How to train; the best of a few one-minute trials, where small batches helped most."""

    steps: int = 8000
    batch: int = 8
    peak_lr: float = 4e-3
    warmup: int = 300
    seed: int = 0


class Document(NamedTuple):
    """One source file or reference topic, named relative to the library."""

    name: str
    text: str

    @property
    def digest(self) -> int:
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")


def gather() -> list[Document]:
    """Read the library's sources and reference topics, without near-copies."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [Document(f"pydoc_data/topics.py#{key}", topics[key]) for key in sorted(topics)]
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED.intersection(name.split("/")) or name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip() and "\ufffd" not in text:
            found.append(Document(name, text))
    return drop_copies(found)


def drop_copies(documents: list[Document]) -> list[Document]:
    """Drop documents that mostly repeat a longer one, so that no held-out text is trained on in a copy."""
    seen: set[str] = set()
    kept = []
    for document in sorted(documents, key=lambda d: (-len(d.text), d.name)):
        lines = {line.strip() for line in document.text.splitlines() if len(line.strip()) >= 30}
        if len(lines & seen) <= 0.3 * len(lines):
            seen |= lines
            kept.append(document)
    return sorted(kept, key=lambda d: d.name)


def excerpts(documents: list[Document]) -> str:
    """JSON lines of about TEXT_BYTES of text, in hash order, documents cut at a line end."""
    rows, left = "", TEXT_BYTES
    for document in sorted(documents, key=lambda d: d.digest):
        # Files with a copyright notice may have other terms than the PSF licence.
        if left < 1000 or "copyright" in document.text.lower() or len(document.text) < 2000:
            continue
        head = document.text.encode()[: min(EXCERPT_BYTES, left)]
        text = head[: head.rfind(b"\n") + 1].decode()
        rows += json.dumps({"source": document.name, "text": text}) + "\n"
        left -= len(text.encode())
    return rows


def train_tokenizer(documents: list[Document]) -> FastTokenizer:
    """Train a byte-level BPE tokenizer that adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[BOS, EOS],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    return FastTokenizer(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def pack(tokenizer: FastTokenizer, documents: list[Document], seed: int) -> torch.Tensor:
    """Encode the documents, shuffled, into one stream: <s> text </s> <s> text </s> ..."""
    texts = random.Random(seed).sample([d.text for d in documents], len(documents))
    stream: list[int] = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        stream += [BOS_ID, *ids, EOS_ID]
    return torch.tensor(stream)


def batches(stream: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Yield batches for ever; each pass shifts the window boundaries and reshuffles."""
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        shift = int(torch.randint(WINDOW, (1,), generator=generator))
        count = (len(stream) - shift - 1) // WINDOW // recipe.batch * recipe.batch
        starts = shift + WINDOW * torch.randperm(count, generator=generator)
        for chosen in starts.view(-1, recipe.batch):
            # One more token than the window, so that WINDOW tokens are predicted.
            yield stream[chosen[:, None] + torch.arange(WINDOW + 1)]


def next_token_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean nats per token, over all but the first token of each window."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def train(stream: torch.Tensor, recipe: Recipe) -> tuple[LlamaForCausalLM, float, float]:
    """Train from scratch; return the model, its loss over the last 100 steps, and seconds."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(CONFIG).train()
    matrices = {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1}
    gains = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, gains], lr=recipe.peak_lr, betas=(0.9, 0.95))

    def rate(step: int) -> float:  # linear warm-up, under a cosine to zero
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)
        return min(1.0, (step + 1) / recipe.warmup) * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses: list[float] = []
    began = time.perf_counter()
    for step, windows in zip(range(1, recipe.steps + 1), batches(stream, recipe)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = next_token_loss(model, windows)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses = [*losses[-99:], loss.item()]
        if step % 100 == 0:
            speed = step * recipe.batch * WINDOW / (time.perf_counter() - began)
            print(f"step {step}  loss {sum(losses) / 100:.4f}  {speed:.0f} tokens/s", flush=True)
    return model.eval(), sum(losses) / len(losses), time.perf_counter() - began


@torch.no_grad()
def perplexity(folder: Path, texts: Path) -> tuple[float, int]:
    """Perplexity of the saved checkpoint in fp32, and how many tokens it is over."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line)["text"] for line in texts.read_text(encoding="utf-8").splitlines()]
    ids = [token for row in tokenizer(rows, add_special_tokens=False)["input_ids"] for token in row]
    count = len(ids) // WINDOW * WINDOW
    return math.exp(next_token_loss(model, torch.tensor(ids[:count]).view(-1, WINDOW))), count


def save_model(folder: Path, model: LlamaForCausalLM, tokenizer: FastTokenizer) -> None:
    """Write the bf16 checkpoint, without config keys that hold local paths."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*config.json"):
        settings = json.loads(path.read_text())
        for key in ("_name_or_path", "name_or_path", "is_local", "local_files_only"):
            settings.pop(key, None)
        if "tokenizer_class" in settings:  # the name that transformers 4 knows, too
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2) + "\n")


README = """\
# Demo model

A small Llama trained from scratch on CPython's standard library, for trying and testing
compression without a download; good for nothing else. `make_model.py` made it and this file.

- Text: sources and reference topics of CPython {version} (licence PSF-2.0; Copyright (c)
  2001-2023 Python Software Foundation; All Rights Reserved).
- Model: {parameters:,} parameters in bf16, tied embeddings; byte-level BPE of 1,024 tokens.
- Training: {training} documents, {stream:,} tokens ({held_out} more held out by a hash of their
  path); seed {r.seed}; {r.steps:,} steps of {r.batch} windows of 256 = {seen:,} tokens
  seen; AdamW, peak rate {r.peak_lr:g}; {seconds:.0f} s on two CPU cores; final loss {loss:.4f}
  nats per token (mean of the last 100 steps).
- Perplexity on `text/evaluation.jsonl` (held out): {measured:.3f}, over its first {count:,}
  tokens: lines encoded one by one without special tokens and joined with nothing between,
  windows of 256, fp32 compute, no BOS, first token of each window not scored.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model and cut its texts.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: here")
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--seed", type=int, default=Recipe().seed)
    options = parser.parse_args()
    recipe = Recipe(steps=options.steps, seed=options.seed)
    torch.set_num_threads(2)
    documents = gather()
    # By a hash of names, so that the split does not depend on which other files exist.
    training = [d for d in documents if d.digest % 32 != 0]
    held_out = [d for d in documents if d.digest % 32 == 0]
    tokenizer = train_tokenizer(training)
    stream = pack(tokenizer, training, recipe.seed)
    model, loss, seconds = train(stream, recipe)
    folder, texts = options.out / "model", options.out / "text"
    texts.mkdir(parents=True, exist_ok=True)
    (texts / "calibration.jsonl").write_text(excerpts(training))
    (texts / "evaluation.jsonl").write_text(excerpts(held_out))
    save_model(folder, model, tokenizer)
    measured, count = perplexity(folder, texts / "evaluation.jsonl")
    facts = README.format(
        version=platform.python_version(), parameters=model.num_parameters(), r=recipe, loss=loss,
        training=len(training), held_out=len(held_out), stream=len(stream), seconds=seconds,
        seen=recipe.steps * recipe.batch * WINDOW, measured=measured, count=count,
    )  # fmt: skip
    (folder / "README.md").write_text(facts, encoding="utf-8")
    print(facts)


if __name__ == "__main__":
    main()
