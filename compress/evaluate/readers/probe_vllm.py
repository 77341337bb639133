"""vLLM as a reader: its engine for CPUs, asked for log-probabilities."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_TOP = 20
"""Log-probabilities of a token; its own default limit."""
_LONGEST = 512
# In this process, whose end is then its end; on the threads that it is given, wherever the system puts them.
_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}  # fmt: skip


class RefusedError(Exception):
    """What the engine says of an artifact that it does not run; told without this name."""


def load(artifact: Path, scratch: Path, base: Path | None, dtype: Any, notes: list[str], trusted: bool) -> Callable[[Any], Any]:
    """Ids [1, length] -> (log-probabilities, tokens), [1, length, 21]: the token that follows, and the 20 likeliest."""
    # What it finds out of its own classes of models it keeps in its environment: finding out takes longer than a small model.
    os.environ.update(_SETTINGS, VLLM_CACHE_ROOT=str(Path(sys.prefix) / "vllm-cache"), VLLM_CONFIG_ROOT=str(scratch))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    # Imported by name, because it is not installed where types are checked.
    vllm = importlib.import_module("vllm")
    config = json.loads((artifact / "config.json").read_text())
    # It looks for files by patterns, in which brackets of a path would mean something.
    place = scratch / "artifact"
    place.symlink_to(artifact.absolute())
    positions = {**config, **(config.get("text_config") or {})}.get("max_position_embeddings") or _LONGEST
    # One more than there are positions, for the token that is drawn after a whole window; nothing is computed for it.
    engine = _told(
        lambda: vllm.LLM(
            str(place), dtype=str(dtype).removeprefix("torch."), enforce_eager=True, trust_remote_code=trusted,
            max_model_len=min(_LONGEST, positions) + 1, max_num_seqs=1, skip_tokenizer_init=True, disable_log_stats=True,
        )
    )  # fmt: skip
    wanted = vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=_TOP, prompt_logprobs=_TOP, detokenize=False)
    notes.append(f"its CPU engine, which gives the log-probabilities of each token that follows and of the {_TOP} likeliest")

    def forward(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        row: list[int] = ids[0].tolist()
        (found,) = _told(lambda: engine.generate([{"prompt_token_ids": row}], wanted, use_tqdm=False))
        (drawn,) = found.outputs
        # Before the first token there is nothing, and so None; after the last one comes the token that was drawn.
        listed = [*found.prompt_logprobs[1:], *drawn.logprobs]
        numbers, tokens = zip(*(_row(*pair) for pair in zip(listed, [*row[1:], drawn.token_ids[0]], strict=True)), strict=True)
        return torch.tensor(numbers)[None], torch.tensor(tokens)[None]

    return forward


def _row(listed: dict[int, Any], follows: int) -> tuple[list[float], list[int]]:
    """The log-probabilities at one position and their tokens: of the one that follows, then of the likeliest in order."""
    likeliest = sorted(listed, key=lambda token: -listed[token].logprob)[:_TOP]
    tokens = [follows, *likeliest]
    return [float(listed[token].logprob) for token in tokens], tokens


def _told(run: Callable[[], Any]) -> Any:
    """What `run` gives. Raises RefusedError with the engine's own words, MemoryError where it finds too little memory."""
    try:
        return run()
    except (ImportError, MemoryError, OSError, torch.distributed.DistError):
        raise
    except Exception as error:
        if "Available memory" in str(error):
            raise MemoryError(str(error)) from error
        raise RefusedError(f"refused by its CPU engine: {type(error).__name__}: {error}") from error
