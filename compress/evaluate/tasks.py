"""Tasks of lm-evaluation-harness, with one block of the model in memory.

Multiple choice and rolling perplexity need log-likelihoods alone, which are computed block by block; a task that generates text
is refused, for it would read the whole model once a token.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.corpus.spec import kind_of
from compress.device import CPU
from compress.errors import CompressError, InputError, MachineError, UsageError, did_you_mean
from compress.evaluate.likelihood import Continuation, Likelihoods
from compress.layerwise.eval_windows import plain_tokenizer

if TYPE_CHECKING:
    from compress.checkpoint.reader import Checkpoint

_KINDS = {"lines": "json", "parquet": "parquet"}
"""Loaders of `datasets` by the kind of a local file."""
_LOADERS = ("json", "parquet", "csv", "text", "arrow")


@dataclass(frozen=True)
class TaskOptions:
    """What is asked of the harness."""

    names: tuple[str, ...]
    files: dict[str, Path]
    """Local data by task, instead of the Hub's."""
    folder: Path | None = None
    """More tasks, as YAML files."""
    limit: int | None = None
    """Documents of each task."""
    shots: int | None = None
    """Examples in a prompt; None for the task's own."""
    seed: int = 0


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task."""

    task: str
    version: str
    shots: int
    metric: str
    value: float
    error: float | None
    """Its standard error, None if the harness has none."""
    documents: int
    dataset: str
    """The Hub's id of its data, or the local file's name."""
    local: bool
    config: str
    """The dataset's configuration, empty for its only one."""
    split: str
    cut: int
    """Contexts that were longer than the model's positions, and lost their beginning."""


def run_tasks(
    checkpoint: Checkpoint, tokenizer_folder: Path, asked: TaskOptions, progress: Callable[[float], None] = lambda share: None,
    device: torch.device = CPU, trusted: bool = False,
) -> list[TaskScore]:  # fmt: skip
    """Every metric of the tasks. Raises MachineError without lm-eval or its data, UsageError, InputError."""
    if find_spec("lm_eval") is None:
        raise MachineError("--tasks", "lm-eval, which has the tasks", "it is not installed", "pip install 'compress-llm[eval]'")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # its bars beside ours
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(asked.folder)
    for name in asked.names:
        if name not in manager.all_tasks:
            known = f"{name}{did_you_mean(name, manager.all_tasks)}"
            raise UsageError("--tasks", "names of tasks, groups or tags of lm-eval", known, "`lm_eval ls tasks` prints them")
    if lacking := [name for name in asked.files if name not in asked.names]:
        raise UsageError("--task-data", f"one of {', '.join(asked.names)}", lacking[0], "name it in --tasks too")
    model = _adaptor()(checkpoint, tokenizer_folder, progress, device, trusted)
    try:
        tasks = [_local(name, asked.files[name], manager) if name in asked.files else name for name in asked.names]
        found = simple_evaluate(
            model, tasks=tasks, num_fewshot=asked.shots, limit=asked.limit,
            task_manager=manager, log_samples=False, random_seed=asked.seed, numpy_random_seed=asked.seed,
            torch_random_seed=asked.seed, fewshot_random_seed=asked.seed, verbosity="ERROR",
        )  # fmt: skip
    except CompressError:
        raise
    except (OSError, ValueError, KeyError) as error:
        do = "check the task's data; offline, name a local file: --task-data TASK=FILE"
        raise InputError(", ".join(asked.names), "tasks that lm-eval can build", _first_line(error), do) from None
    return list(_scores(found, asked, model.cut))


@lru_cache(maxsize=1)
def _manager(folder: Path | None) -> Any:
    """The harness's index of its tasks and of those in `folder`; reading its thousands of files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder) if folder else None)


def harness() -> str:
    """Name and version of the harness."""
    return f"lm-eval {version('lm-eval')}"


def _local(name: str, file: Path, manager: Any) -> Any:
    """A task of the harness over a local file instead of the Hub's data, by a YAML file that includes its own."""
    from lm_eval.tasks import TaskManager

    kind = _KINDS.get(kind_of(str(file)) or "")
    if kind is None or not file.is_file():
        got = str(file) if file.is_file() else f"{file}, which is not there"
        raise UsageError("--task-data", "a file .jsonl or .parquet", got, "convert it to one of them")
    own = manager.task_index[name].yaml_path
    if own is None or name in (*manager.all_groups, *manager.all_tags):
        raise UsageError("--task-data", "a single task", f"{name}, a group of them", "name its tasks one by one")
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "include": str(own), "task": name, "dataset_path": kind, "dataset_name": None, "training_split": None,
            "validation_split": None, "test_split": "test", "fewshot_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(file.absolute())}},
        }  # fmt: skip
        (Path(folder) / "local.yaml").write_text(json.dumps(settings))
        return TaskManager(include_path=folder, include_defaults=False).load(name)["tasks"][name]


def _scores(found: Any, asked: TaskOptions, cut: int) -> Any:
    """TaskScore of every metric that has a number."""
    for task, metrics in found["results"].items():
        config = found["configs"].get(task, {})
        dataset = asked.files[task].name if task in asked.files else str(config.get("dataset_path", ""))
        local = task in asked.files or dataset in _LOADERS
        split = str(config.get("test_split") or config.get("validation_split") or "")
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not kind:
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            yield TaskScore(
                task, str(found["versions"].get(task, "")), int(found["n-shot"].get(task, 0)), metric, float(value),
                float(error) if isinstance(error, int | float) else None,
                int(found.get("n-samples", {}).get(task, {}).get("effective", 0)), dataset, local,
                str(config.get("dataset_name") or ""), split, cut,
            )  # fmt: skip


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _adaptor() -> Any:
    """The class by which the harness asks; made when lm-eval is there to inherit from."""
    from lm_eval.api.model import TemplateLM

    class Streamed(TemplateLM):  # type: ignore[misc]
        """A checkpoint as the harness sees a model."""

        def __init__(
            self, checkpoint: Checkpoint, folder: Path, progress: Callable[[float], None], device: torch.device, trusted: bool
        ) -> None:
            super().__init__()
            self.tokenizer = plain_tokenizer(folder, trusted)
            self.scorer, self.progress, self.cut = Likelihoods(checkpoint, device), progress, 0
            self.label = self.scorer.side.label

        @property
        def eot_token_id(self) -> int:
            found = self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.tokenizer.bos_token_id
            return int(found) if found is not None else 0

        @property
        def prefix_token_id(self) -> int:
            """What stands before a text that nothing precedes: BOS, else EOS."""
            return int(self.tokenizer.bos_token_id) if self.tokenizer.bos_token_id is not None else self.eot_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            """Without special tokens, as `compress eval` reads a text."""
            return list(self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])

        def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            asked = [self._fitting(context, words) for _, context, words in requests]
            return [(score.log_likelihood, score.greedy) for score in self.scorer.of(asked, self.progress)]

        def _fitting(self, context: list[int], words: list[int]) -> Continuation:
            """Leaves the beginning of a context out that the positions have no room for."""
            positions = self.scorer.side.positions()
            if positions is not None and len(context) + len(words) - 1 > positions:
                self.cut += 1
                context = context[len(context) + len(words) - 1 - positions :]
            return Continuation(tuple(context), tuple(words))

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            """log p of whole texts, in windows of the model's positions that do not overlap (2,048 if it names none)."""
            from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

            length = min(self.scorer.side.positions() or 2048, 2048)
            asked, owners = [], []
            for number, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                windows = get_rolling_token_windows(ids, self.prefix_token_id, length, 1)
                for context, words in map(make_disjoint_window, windows):
                    asked.append(Continuation(tuple(context), tuple(words)))
                    owners.append(number)
            sums = [0.0] * len(requests)
            for number, score in zip(owners, self.scorer.of(asked, self.progress)):
                sums[number] += score.log_likelihood
            return sums

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            do = "take tasks of multiple choice or perplexity, or run this one by lm_eval on what transformers loads"
            raise UsageError("--tasks", "tasks that score given texts", "one that generates text", do)

    return Streamed
