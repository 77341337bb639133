"""card: what README.md says of an artifact, what becomes of the source's, and names that are no Markdown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compress.checkpoint.manifest import Source
from compress.checkpoint.reader import KEPT, README, open_checkpoint
from compress.checkpoint.scan import file_digest
from compress.context import Context
from compress.errors import InputError
from compress.evaluate.verify import verify_bytes
from compress.pipeline.model_card import card, carried
from support import do, ready_inputs, run, step_of, tiny_llama

RTN = "quantize.rtn(scheme=w4a16g32)"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with a README and an evaluation of its own."""
    made = tiny_llama(tmp_path / "a model")
    (made / "README.md").write_text("---\nlicense: apache-2.0\nmodel-index: 81.2\n---\n# Ours\n\n81.2 % on everything.\n")
    (made / "EVAL.md").write_text("perplexity 9.9\n")
    return made


def text_of(out: Path) -> str:
    return (out / README).read_text()


def test_an_artifact_says_what_it_is_and_keeps_what_was_said_of_its_source(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "out", f"{RTN} | pack")
    said = text_of(tmp_path / "out")
    errors = sorted(record.error for record in result.manifest.weights.values() if record.error is not None)
    for word in (
        '---\nlicense: "apache-2.0"\n---\n', "# a model, by compress", "| base model | `a model` |", f"    {RTN} | pack()\n",
        "| 14 | `codes(w4a16g32)` | 4.5", f"| {errors[0]:.4f} to {errors[-1]:.4f} | - |", "| transformers | yes |",
        'LlamaForCausalLM.from_pretrained("PATH")', "compress 0.1.0, seed 0", "README.source.md, EVAL.source.md",
    ):  # fmt: skip
        assert word in said, word
    assert "81.2" not in said
    assert str(tmp_path) not in said
    assert "base_model" not in said, "a folder's name is no model of the Hub"
    for name, kept in KEPT.items():
        assert (tmp_path / "out" / kept).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "EVAL.md").exists()
    for name in KEPT.values():
        assert result.manifest.files[name] == file_digest(tmp_path / "out" / name)
    assert verify_bytes(open_checkpoint(tmp_path / "out"), Context()).named
    # The same bytes again, and nothing to do where they are.
    assert run(source, tmp_path / "again", f"{RTN} | pack").manifest.fingerprint == result.manifest.fingerprint
    assert text_of(tmp_path / "again") == said
    assert not run(source, tmp_path / "out", f"{RTN} | pack").fresh
    # It may be written on: no digest holds it.
    (tmp_path / "out" / README).write_text("mine")
    assert not run(source, tmp_path / "out", f"{RTN} | pack").fresh
    assert verify_bytes(open_checkpoint(tmp_path / "out"), Context()).named
    (tmp_path / "out" / "README.source.md").write_text("mine")
    with pytest.raises(InputError, match=r"README\.source\.md"):
        run(source, tmp_path / "out", f"{RTN} | pack")


def test_runs_after_runs_do_not_pile_up(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "codes", RTN)
    assert "Its codes are not packed yet" in text_of(tmp_path / "codes")
    run(tmp_path / "codes", tmp_path / "packed", "pack(format=native)")
    run(tmp_path / "packed", tmp_path / "again", "unpack | pack")
    run(source, tmp_path / "once", f"{RTN} | pack(format=native)")
    for out in ("codes", "packed", "again", "once"):
        names = {path.name for path in (tmp_path / out).iterdir() if path.suffix == ".md"}
        assert names == {README, *KEPT.values()}
        assert (tmp_path / out / "README.source.md").read_bytes() == (source / README).read_bytes()
        assert 'license: "apache-2.0"' in text_of(tmp_path / out)
    assert text_of(tmp_path / "packed") == text_of(tmp_path / "once"), "by the same steps, in one run or in two"
    assert 'compress.load("PATH")' in text_of(tmp_path / "once")
    assert f"    {RTN} | pack(format=native) | unpack() | pack()\n" in text_of(tmp_path / "again")
    # The steps between have one, too, and it is theirs.
    between = step_of(tmp_path / "once", "quantize.rtn")
    assert "| format | `canonical`" in text_of(between)
    assert text_of(between) != text_of(tmp_path / "once")


def test_a_source_without_one_and_one_with_both(source: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(source, tmp_path / "plain")
    for name in KEPT:
        (plain / name).unlink()
    result = run(plain, tmp_path / "out", "prune.magnitude(sparsity=0.5)")
    assert "\n---\n" not in text_of(tmp_path / "out").split("# ")[0]
    assert "Of the base model" not in text_of(tmp_path / "out")
    assert not any(name.endswith(".source.md") for name in result.manifest.files)
    assert 'LlamaForCausalLM.from_pretrained("PATH")' in text_of(tmp_path / "out")
    (source / "README.source.md").write_text("older\n")
    result = run(source, tmp_path / "both", RTN)
    assert (tmp_path / "both" / "README.source.md").read_text() == "older\n"
    (note,) = (note for note in result.manifest.notes if note.what == "left behind")
    assert (note.names, note.reason) == (("README.md",), "README.source.md is there already")


def test_errors_of_outputs_and_what_it_was_calibrated_on(tmp_path: Path) -> None:
    recipe = f"calibrate(data='{ready_inputs()}', samples=6) | quantize.gptq(scheme=w4a16g32)"
    result = do(tiny_llama(tmp_path / "model"), tmp_path / "out", recipe)
    outputs = sorted(r.output_error for r in result.manifest.weights.values() if r.output_error is not None)
    assert f"| {outputs[0]:.4f} to {outputs[-1]:.4f} |\n" in text_of(tmp_path / "out")
    # Tokens that wait between steps are no checkpoint.
    assert not (step_of(tmp_path / "out", "calibrate") / README).exists()


def test_hostile_names_stay_names(tmp_path: Path) -> None:
    name = "a](http:x)|<script>`` # b"
    made = tiny_llama(tmp_path / name)
    (made / "README.md").write_text('---\nlicense: "mit"\nlicense: "x\\n- y"\n---\n')
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    run(made, tmp_path / "out", RTN)
    said = text_of(tmp_path / "out")
    assert "# a\\]\\(http\\:x\\)\\|\\<script\\>\\`\\` \\# b, by compress" in said
    assert "| base model | ``` a](http:x)\\|<script>`` # b ``` |" in said
    assert 'license: "mit"' in said


def test_a_model_of_the_hub_is_named_for_its_index(source: Path, tmp_path: Path) -> None:
    manifest = run(source, tmp_path / "out", RTN).manifest
    for name, licence, head in (
        ("org/tiny", "mit", '---\nbase_model: "org/tiny"\nlicense: "mit"\n---\n'),
        ("org/tiny", "a: b", '---\nbase_model: "org/tiny"\nlicense: "gpl-3.0"\n---\n'),
        ("org/ti\nny", None, '---\nlicense: "gpl-3.0"\n---\n'),
    ):
        found = manifest.model_copy(update={"source": Source(name=name, commit="c0ffee", licence=licence, fingerprint="f")})
        said = card(found, 10, {"architectures": ["__import__('os')"]}, (), "gpl-3.0")
        assert said.startswith(head)
        assert "commit `c0ffee`" in said
        assert "__import__" not in said


def test_only_what_tells_of_the_source_is_renamed(tmp_path: Path) -> None:
    for name in ("README.md", "EVAL.md", "USAGE.md"):
        (tmp_path / name).write_text("x")
    side = {path.name: path for path in tmp_path.iterdir()}
    assert set(carried(side)) == {"README.source.md", "EVAL.source.md", "USAGE.md"}
