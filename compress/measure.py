"""Measure: perplexity and KL of two models, with the protocol beside them.

Windows of `length` tokens without overlap, no BOS added, the first token of a window not scored, logits in fp32.
KL(source || artifact) is in nats per scored token; its standard error takes windows as independent.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Quality:
    """What `compare` found."""

    tokens: int
    length: int
    source_perplexity: float
    perplexity: float
    kl: float
    kl_error: float
    top1: float
    """Share of scored positions where both models' likeliest token is the same."""

    @property
    def protocol(self) -> str:
        return f"first {self.tokens:,} tokens, windows of {self.length}, fp32, no BOS, first token of a window not scored"


def token_windows(tokenizer_folder: Path, text_file: Path, length: int, limit: int | None = None) -> torch.Tensor:
    """Token ids [windows, length] of a jsonl file's `text` fields, joined in order. Raises InputError if too short."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    ids: list[int] = []
    for line in text_file.read_text(encoding="utf-8").splitlines():
        ids += tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
    count = min(len(ids), limit or len(ids)) // length
    if not count:
        raise InputError(str(text_file), f"at least {length} tokens", f"{len(ids)} tokens")
    return torch.tensor(ids[: count * length]).reshape(count, length)


def compare(source: nn.Module, artifact: nn.Module, windows: torch.Tensor, batch: int = 8) -> Quality:
    """Runs both models side by side over `windows` [count, length]; nothing but sums is kept."""
    import torch

    nll = [0.0, 0.0]
    same, kl_windows = 0, []
    with torch.inference_mode():
        for ids in windows.split(batch):
            logs = [model(input_ids=ids).logits[:, :-1].float().log_softmax(-1) for model in (source, artifact)]
            for i, log in enumerate(logs):
                nll[i] -= float(log.gather(-1, ids[:, 1:, None]).sum(dtype=torch.float64))
            p, q = logs
            kl_windows.append((p.exp() * (p - q)).sum(-1).mean(-1).double())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
    scored = windows.numel() - windows.shape[0]
    kl = torch.cat(kl_windows)
    error = float(kl.std() / math.sqrt(len(kl))) if len(kl) > 1 else math.nan
    return Quality(
        windows.numel(), windows.shape[1], math.exp(nll[0] / scored), math.exp(nll[1] / scored),
        float(kl.mean()), error, same / scored,
    )  # fmt: skip
