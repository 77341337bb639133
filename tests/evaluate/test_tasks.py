"""Tasks of lm-eval: scores of a checkpoint block by block, beside those that the harness has from the whole model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.checkpoint.reader import open_checkpoint
from compress.errors import InputError, UsageError
from compress.evaluate.tasks import TaskOptions, TaskScore, run_tasks
from forked import compress

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytestmark = pytest.mark.slow

CHOICE = {
    "task": "guess", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{ask}}",
    "doc_to_choice": "options", "doc_to_target": "answer", "metadata": {"version": 3},
    "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
}  # fmt: skip
TEXT = {
    "task": "texts", "dataset_path": "json", "output_type": "loglikelihood_rolling", "test_split": "test", "doc_to_text": "",
    "doc_to_target": "{{text}}", "metadata": {"version": 1},
    "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
}  # fmt: skip
SAYS = {**CHOICE, "task": "says", "output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tasks over a local file."""
    rows = [
        {"ask": ask, "options": [" os", " the cat", " = = ="], "answer": n % 3, "text": f"{ask} os\nfor a in b:\n" * 40}
        for n, ask in enumerate(("import", "from json import", "def f(", "import", "return", "class A:"))
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    for task in (CHOICE, TEXT, SAYS):
        settings = {**task, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
        (tmp_path / "tasks" / f"{task['task']}.yaml").write_text(json.dumps(settings))
    return tmp_path


def by_metric(scores: list[TaskScore]) -> dict[tuple[str, str], float]:
    return {(score.task, score.metric): score.value for score in scores}


def test_scores_are_those_of_the_harness_on_the_whole_model(demo_model: Path, folder: Path) -> None:
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    asked = TaskOptions(("guess", "texts"), {}, folder / "tasks")
    found = run_tasks(open_checkpoint(demo_model), demo_model, asked)
    theirs = simple_evaluate(
        HFLM(pretrained=str(demo_model), dtype=torch.float32, device="cpu", add_bos_token=False), tasks=["guess", "texts"],
        task_manager=TaskManager(include_path=str(folder / "tasks")), log_samples=False,
    )["results"]  # fmt: skip
    assert by_metric(found) == pytest.approx(
        {("guess", m): theirs["guess"][f"{m},none"] for m in ("acc", "acc_norm")}
        | {("texts", "word_perplexity"): theirs["texts"]["word_perplexity,none"]},
        rel=1e-4,
    )
    assert [(score.version, score.documents, score.shots, score.cut) for score in found[:1]] == [("3", 6, 0, 0)]


def test_a_local_file_stands_in_for_the_hubs_data(demo_model: Path, folder: Path) -> None:
    row = {
        "ind": 1, "activity_label": "Cooking", "ctx_a": "A man cuts an onion.", "ctx_b": "he", "label": "1", "split_type": "x",
        "endings": ["flies.", "puts it into the pan.", "is blue.", "sings."], "split": "val", "source_id": "x",
    }  # fmt: skip
    rows = [{**row, "ctx": "A man cuts an onion. he", "activity_label": f"Cooking {n}"} for n in range(4)]
    (folder / "h.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = TaskOptions(("hellaswag",), {"hellaswag": folder / "h.jsonl"}, limit=3, shots=1)
    found = run_tasks(open_checkpoint(demo_model), demo_model, asked)
    assert {(score.metric, score.documents, score.shots, score.dataset) for score in found} == {
        ("acc", 3, 1, "h.jsonl"), ("acc_norm", 3, 1, "h.jsonl"),
    }  # fmt: skip
    assert all(0 <= score.value <= 1 and score.error is not None for score in found)


def test_what_cannot_be_run_is_refused(demo_model: Path, folder: Path) -> None:
    model = open_checkpoint(demo_model)
    for asked, kind, said in (
        (TaskOptions(("hellaswagg",), {}), UsageError, "hellaswagg'?.*did you mean .*hellaswag"),
        (TaskOptions(("says",), {}, folder / "tasks"), UsageError, "one that generates text"),
        (TaskOptions(("guess",), {"other": folder / "rows.jsonl"}, folder / "tasks"), UsageError, "name it in --tasks too"),
        (TaskOptions(("guess",), {"guess": folder / "no.jsonl"}, folder / "tasks"), UsageError, "not there"),
        (TaskOptions(("mmlu",), {"mmlu": folder / "rows.jsonl"}), UsageError, "a group of them"),
        (TaskOptions(("hellaswag",), {"hellaswag": folder / "rows.jsonl"}), InputError, "hellaswag"),
    ):
        with pytest.raises(kind, match=said):
            run_tasks(model, demo_model, asked)


def test_the_command(demo_model: Path, folder: Path) -> None:
    common = ("eval", demo_model, "--tasks", "guess,texts", "--task-folder", folder / "tasks")
    done = compress(*common, "--against", demo_model)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["task", "metric", "source", "artifact", "+-", "questions", "shots"]
    assert {(line[0], line[1]) for line in lines[2:5]} == {("guess", "acc"), ("guess", "acc_norm"), ("texts", "word_perplexity")}
    assert all(line[2] == line[3] for line in lines[2:5]), "a model against itself"
    assert "protocol: lm-eval" in done.stdout
    facts = json.loads(compress(*common, "--json", "--limit", 2).stdout)
    assert {score["documents"] for score in facts["tasks"]} == {2}
    assert "source_tasks" not in facts
    both = compress(*common, "--json", "--data", demo_model.parent / "text" / "evaluation.jsonl", "--tokens", 256)
    assert json.loads(both.stdout)["perplexity"]["value"] > 1
