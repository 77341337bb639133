"""card: what README.md says of an artifact, with evidence; code that runs; hostile texts that stay texts."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import compress
from compress.checkpoint.manifest import Manifest, Source
from compress.checkpoint.reader import ABOUT, PICTURE, README, open_checkpoint
from compress.context import Context
from compress.errors import InputError
from compress.evaluate import records
from compress.evaluate.records import ReaderRecord, TaskRecord
from compress.evaluate.verify import verify_bytes
from compress.pipeline.run import Options
from compress.report.card import card, command
from compress.report.facts import read_facts
from compress.report.picture import picture
from compress.report.write_card import write_card
from hostile_facts import HOSTILE, hostile, measured
from support import step_of, tiny_llama

RTN = "quantize.rtn(scheme=w4a16g32)"
CTX = Context(threads=2)


def run(source: Path, out: Path, recipe: str, **options: Any) -> compress.Result:
    return compress.run(recipe, source, out, CTX, Options(**options))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with a README and an evaluation of its own."""
    made = tiny_llama(tmp_path / "a model")
    (made / "README.md").write_text("---\nlicense: apache-2.0\nmodel-index: 81.2\n---\n# Ours\n\n81.2 % on everything.\n")
    (made / "EVAL.md").write_text("perplexity 9.9\n")
    return made


@pytest.fixture(scope="module")
def packed(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in 4 bits; do not write into it."""
    out = tmp_path_factory.mktemp("card") / "packed"
    run(demo_model, out, f"{RTN} | pack")
    return out


def text_of(out: Path) -> str:
    return (out / README).read_text()


def test_an_artifact_says_what_it_is_and_links_to_its_source(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(source, out, f"{RTN} | pack")
    said = text_of(out)
    errors = sorted(record.error for record in result.manifest.weights.values() if record.error is not None)
    for word in (
        "license: apache-2.0\n", "library_name: transformers\n", "pipeline_tag: text-generation\n", "- 4-bit\n",
        "# a model, w4a16g32 by compress\n", "| base model | `a model` |", f"compress run './a model' OUT -p '{RTN} | pack()'\n",
        "| 14 | `codes(w4a16g32)` | 4.5", f"| {errors[0]:.4f} to {errors[-1]:.4f} | - |", "| transformers | yes | not verified |",
        "LlamaForCausalLM.from_pretrained(\"PATH\")", "compress 0.1.0, seed 0", "Quality is not measured: `compress eval",
        f"| fingerprint | `{result.manifest.fingerprint}` |", "| source | ", "| 1. `quantize.rtn` | ", "| 2. `pack` | ",
    ):  # fmt: skip
        assert word in said, word
    assert "81.2" not in said
    assert str(tmp_path) not in said
    assert "base_model" not in said, "a folder's name is no model of the Hub"
    # What tells of the source is left behind, and counted.
    assert {path.name for path in out.iterdir() if path.suffix in (".md", ".svg")} == {README, PICTURE}
    (note,) = (note for note in result.manifest.notes if note.what == "left behind")
    assert note.names == ("README.md", "EVAL.md")
    assert result.manifest.source.licence == "apache-2.0"
    assert not {*ABOUT} & result.manifest.files.keys()
    assert verify_bytes(open_checkpoint(out), CTX).named
    # The same bytes again, and nothing to do where they are.
    assert run(source, tmp_path / "again", f"{RTN} | pack").manifest.fingerprint == result.manifest.fingerprint
    assert text_of(tmp_path / "again") == said
    assert (tmp_path / "again" / PICTURE).read_bytes() == (out / PICTURE).read_bytes()
    # It may be written on: no digest holds it, and no run replaces it.
    (out / README).write_text("mine")
    assert not run(source, out, f"{RTN} | pack").fresh
    assert text_of(out) == "mine"
    with pytest.raises(InputError, match="a card that compress has written"):
        write_card(out)
    # A run that was killed before it had a card makes one.
    (out / README).unlink()
    assert not run(source, out, f"{RTN} | pack").fresh
    assert text_of(out) == said


def test_runs_after_runs_say_the_same_as_one(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "model")
    run(source, tmp_path / "codes", RTN)
    assert "Its codes are not packed yet" in text_of(tmp_path / "codes")
    run(tmp_path / "codes", tmp_path / "packed", "pack(format=native)")
    run(source, tmp_path / "once", f"{RTN} | pack(format=native)")
    assert text_of(tmp_path / "packed") == text_of(tmp_path / "once"), "by the same steps, in one run or in two"
    assert 'compress.load("PATH")' in text_of(tmp_path / "once")
    assert "library_name: compress\n" in text_of(tmp_path / "once")
    assert not (step_of(tmp_path / "once", "quantize.rtn") / README).exists()
    run(source, tmp_path / "gone", f"{RTN} | pack(format=native)", keep=False)
    assert text_of(tmp_path / "gone") == text_of(tmp_path / "once"), "with its steps or without"


def test_a_dense_result(source: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(source, tmp_path / "plain")
    for name in ("README.md", "EVAL.md"):
        (plain / name).unlink()
    result = run(plain, tmp_path / "out", "prune.magnitude(sparsity=0.5)")
    assert not [note for note in result.manifest.notes if note.what == "left behind"]
    said = text_of(tmp_path / "out")
    assert "- sparse\n" in said
    assert "license:" not in said
    assert "The source names no licence" in said
    assert 'LlamaForCausalLM.from_pretrained("PATH")' in said
    assert "share of zeros" in (tmp_path / "out" / PICTURE).read_text()


@pytest.mark.parametrize("reader", ["transformers", "native", "peft"])
def test_the_code_of_a_card_runs(
    reader: str, demo_model: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if reader == "transformers":
        pytest.importorskip("compressed_tensors")
        out = packed
    else:
        if reader == "peft":
            pytest.importorskip("peft")
        out = tmp_path / "out"
        recipe = (
            f"{RTN} | pack(format=native)"
            if reader == "native"
            else "quantize.loftq(scheme=nf4g64, rank=4, targets=[attention]) | pack(format=peft)"
        )
        run(demo_model, out, recipe)
    facts = read_facts(out)
    blocks = re.findall(r"^```python\n(.*?)^```$", card(facts, str(out)), re.MULTILINE | re.DOTALL)
    (code,) = (block for block in blocks if "vllm" not in block)
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), names)
    assert names["model"] is not None
    if reader != "peft":
        assert "The capital of France is" in capsys.readouterr().out


def test_what_was_measured_and_verified_is_shown(packed: Path, tmp_path: Path) -> None:
    out = shutil.copytree(packed, tmp_path / "out")
    manifest = Manifest.read(out)
    assert manifest is not None
    records.keep_reader(
        out,
        manifest.fingerprint,
        "transformers",
        ReaderRecord(passed=True, version="5.23.1", dtype="bfloat16", kl=1e-5, top1=1.0),
    )
    records.keep_reader(out, manifest.fingerprint, "vllm", ReaderRecord(passed=False, reason="other `logits` | here"))
    facts = measured(read_facts(out))
    said = card(facts)
    for word in (
        "| transformers | yes | yes, 5.23.1: KL 1e-05 to the decoded weights in bfloat16, same top-1 100.0% |",
        "| vllm | yes | no: `` other `logits` \\| here `` |", "| 12.35 ± 0.21 | 0.1234 ± 0.0011 | 81.5 ± 1.0 % |",
        "Measured on `held out.jsonl` (sha256 `dddddddddddddddd`)", "| `hellaswag` | `acc_norm` | 0.41 | 0 | 10042 | lm-eval 0.4 |",
    ):  # fmt: skip
        assert word in said, word
    assert "from vllm" not in said, "it was verified not to load it"
    data = ModelCard(said).data
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "perplexity": 12.345, "kl_to_source": 0.1234, "top1_agreement": 0.815, "acc_norm": 0.41,
    }  # fmt: skip
    assert (data.model_name, ModelCard(card(facts, "someone/tiny-w4")).data.model_name) == ("out", "tiny-w4"), (
        "as in its repository"
    )
    # Records of other bytes are not shown.
    stale = json.loads((out / "verification.json").read_text()) | {"fingerprint": "other"}
    (out / "verification.json").write_text(json.dumps(stale))
    assert "| transformers | yes | not verified |" in card(read_facts(out))
    assert "- No reader was verified on these bytes" in card(read_facts(out))
    assert "- No reader was verified" not in said


def test_results_on_a_dataset_of_the_hub_are_written_for_its_leaderboard(packed: Path, tmp_path: Path) -> None:
    from huggingface_hub.repocard import yaml  # type: ignore[attr-defined]

    out = shutil.copytree(packed, tmp_path / "out")
    fingerprint = read_facts(out).manifest.fingerprint
    task = {"metric": "acc", "value": 0.5, "harness": "lm-eval 0.4.9", "samples": 20, "when": "2026-11-28T00:00:00Z"}
    records.keep_tasks(out, fingerprint, [
        TaskRecord(task="arc_easy", dataset="allenai/ai2_arc", config="ARC-Easy", dataset_revision="c0ffee", **task),
        TaskRecord(task="some", dataset="../../x/y", complete=False, **task), TaskRecord(task="local", **task),
    ])  # fmt: skip
    assert [path.name for path in write_card(out)] == [PICTURE, "ai2_arc.yaml", README]
    assert [path.name for path in (out / ".eval_results").iterdir()] == ["ai2_arc.yaml"], (
        "neither a local file nor a part of a split"
    )
    (entry,) = yaml.safe_load((out / ".eval_results" / "ai2_arc.yaml").read_text())
    assert entry == {
        "dataset": {"id": "allenai/ai2_arc", "task_id": "ARC-Easy", "revision": "c0ffee"}, "value": 0.5,
        "date": "2026-11-28T00:00:00Z", "notes": "acc, 0-shot, 20 samples, lm-eval 0.4.9",
    }  # fmt: skip
    assert verify_bytes(open_checkpoint(out), CTX).named, "a hidden folder is no part of the checkpoint"


def test_hostile_texts_stay_texts(packed: Path) -> None:
    facts = hostile(read_facts(packed))
    said = card(facts, HOSTILE)
    data = ModelCard(said).data.to_dict()
    assert "evil" not in data
    assert not {"license", "base_model"} & data.keys(), "neither a licence nor a model of the Hub"
    assert "__import__" not in said
    body = said.partition("\n---\n\n<!--")[2]
    html = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render("<!--" + body)
    assert "<script" not in html.replace("&lt;script", "")
    assert re.findall(r'<(?:a|img)[^>]*(?:href|src)="([^"]*)"', html) == [PICTURE]
    assert "evil: 1</h" not in html
    assert html.count("<h1>") == 1
    # A row of a table is one line, whatever is in it.
    assert not [line for line in said.splitlines() if line.startswith("evil")]
    drawn = picture(facts.layers)
    assert "<script" not in drawn
    assert "\n---" not in drawn


def test_a_model_of_the_hub_is_named_for_its_index(packed: Path) -> None:
    facts = read_facts(packed)
    for name, licence, relation, expected in (
        ("org/tiny", "mit", "quantized", {"base_model": "org/tiny", "license": "mit"}),
        ("org/tiny@v1", "a: b", "quantized", {"base_model": "org/tiny"}),
        ("org/ti\nny", None, None, {}),
    ):
        source = Source(name=name, commit="c0ffee", licence=licence, fingerprint="f")
        found = replace(facts, manifest=facts.manifest.model_copy(update={"source": source}))
        data = ModelCard(card(found)).data.to_dict()
        assert {key: data[key] for key in ("base_model", "license") if key in data} == expected
        assert data.get("base_model_relation") == relation
        assert "commit `c0ffee`" in card(found)
        if relation:
            assert "org/tiny), whose card tells of the model itself" in card(found)
            assert command(found).startswith("compress run org/tiny@c0ffee OUT")
