"""Every pass, found by path: its text round-trips, its flags exist, its facts are true, its input stays as it was."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from compress.architecture.weight_map import resolve as resolve_names
from compress.checkpoint.reader import open_checkpoint
from compress.contract.discover import caption, load_pass, pass_files
from compress.contract.pass_base import Pass
from compress.pipeline.resolve import json_schema, resolve
from compress.spec.recipe import Recipe, parse_one_liner
from compress.spec.recipe_file import parse_yaml
from families import build
from support import ready_inputs, run, step_of, tree

CALIBRATE = f"calibrate(data='{ready_inputs()}', samples=6)"


def example(name: str) -> str:
    """A recipe that ends in a pass, on token ids that every tiny model can read; a pass without an example needs no options."""
    text = load_pass(name).example or name
    return f"{CALIBRATE}{text.removeprefix('calibrate')}" if text.split(" ")[0] == "calibrate" else text


def start(name: str, tiny: Path, scratch: Path) -> Path:
    """What the example of a pass starts from: a dense model of its family, or a packed one."""
    cls = load_pass(name)
    source = tiny if cls.example_family == "llama" else build(cls.example_family, scratch)
    if not cls.unpacks:
        return source
    run(source, scratch / "packed", load_pass("pack").example)
    return scratch / "packed"


def made(name: str) -> Pass:
    return resolve(parse_one_liner(example(name)))[-1]


@pytest.mark.parametrize("name", pass_files())
def test_text_round_trips(name: str) -> None:
    pass_ = made(name)
    recipe = Recipe((pass_.line(),))
    assert resolve(parse_one_liner(recipe.one_liner())) == [pass_]
    assert resolve(parse_yaml(recipe.to_yaml())) == [pass_]


@pytest.mark.parametrize("name", pass_files())
def test_words_are_there(name: str) -> None:
    cls = load_pass(name)
    assert cls.pass_name() == name
    assert caption(name)
    assert cls.__doc__
    for key, field in cls.model_fields.items():
        assert field.description, f"{name}.{key} has no description"


@pytest.mark.parametrize("name", pass_files())
def test_fields_cannot_change(name: str) -> None:
    pass_ = made(name)
    with pytest.raises(ValueError, match="frozen"):
        setattr(pass_, next(iter(type(pass_).model_fields)), None)


@pytest.mark.parametrize("name", pass_files())
def test_input_is_untouched_and_the_same_seed_gives_the_same_fingerprint(name: str, tiny: Path, tmp_path: Path) -> None:
    source = start(name, tiny, tmp_path)
    before = tree(source)
    recipe = example(name)
    a, b = (run(source, tmp_path / out, recipe) for out in ("a", "b"))
    assert tree(source) == before
    assert a.manifest.fingerprint == b.manifest.fingerprint


@pytest.mark.parametrize("name", pass_files())
def test_declared_facts_are_what_is_on_disk(name: str, tiny: Path, tmp_path: Path) -> None:
    result = run(start(name, tiny, tmp_path), tmp_path / "out", example(name))
    step = result.plan.steps[-1]
    out = open_checkpoint(tmp_path / "out")
    written = {ref.name: (ref.dtype, ref.shape) for ref in out.refs.values()}
    declared = {s.name: (s.dtype, s.shape) for weight in result.plan.weights for s in step.specs(weight)}
    assert written == declared
    recorded = {n: r.state for n, r in result.manifest.weights.items()}
    assert recorded == {n: str(s) for n, s in step.after.items() if n in recorded}
    if result.manifest.format == "canonical":
        assert {n: str(e.state) for n, e in out.logical.items()} == {n: str(s) for n, s in step.after.items()}
        assert {w.name: w.shape for w in resolve_names(out).weights} == {w.name: w.shape for w in result.plan.weights}


def test_the_schema_takes_good_recipes_and_no_others() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    good = {"version": 1, "passes": [{"quantize.rtn": {"scheme": "w4a16g64", "targets": ["linear"]}}, {"pack": {}}]}
    jsonschema.validate(good, schema)
    for bad in ({"version": 2, "passes": [{"pack": {}}]}, {"version": 1, "passes": []}, {"version": 1, "passes": [{"pack": {"formt": "x"}}]},
                {"version": 1, "passes": [{"quantize.rtn": {"scheme": "w7a16"}}]}):  # fmt: skip
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)


def test_a_canonical_step_says_that_it_is_one(tiny: Path, tmp_path: Path) -> None:
    """Another reader must not take it for a dense checkpoint with missing weights."""
    from transformers import AutoModelForCausalLM

    run(tiny, tmp_path / "out", "quantize.rtn(scheme=w4a16g32) | pack")
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(step_of(tmp_path / "out", "quantize.rtn"))
