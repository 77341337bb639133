"""A recipe's last line, push:, from the plan to a model that loads from the Hub; and what is read from a Hub."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from compress.spec.recipe_file import parse_yaml
from hub_artifact import RECIPE, REPO, Typed, licensed, same
from hub_server import Hub
from support import tree

PASSES = "version: 1\npasses:\n- quantize.rtn: {scheme: w4a16g32}\n"


def recipe(folder: Path, passes: str = f"{PASSES}- pack: {{}}\n", push: str = f"push: {{repo: {REPO}, private: true}}\n") -> Path:
    file = folder / "recipe.yaml"
    file.write_text(passes + push)
    return file


def test_a_recipe_reads_back_with_its_push(tmp_path: Path) -> None:
    found = parse_yaml(recipe(tmp_path).read_text())
    assert found.push is not None
    assert found.push.options == {"repo": REPO, "private": True}
    assert parse_yaml(found.to_yaml()) == found
    assert "push" not in found.one_liner()


@pytest.mark.usefixtures("warm")
def test_from_the_plan_to_a_model_that_loads(hub: Hub, typed: Typed, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source, file, out = licensed(tmp_path / "source"), recipe(tmp_path), tmp_path / "out"
    status, said, err = typed("plan", source, file)
    assert status == 0, err
    assert f"push:     to {REPO} (new, private, main) by someone; licence apache-2.0; verified by transformers first" in said
    assert not hub.writes()

    status, said, err = typed("run", source, out, file)
    assert status == 0, err
    assert "verified: transformers" in said
    assert f"pushed:   {hub.url}/{REPO}" in said
    assert hub.repos[REPO].private
    same(hub, out)

    hub.requests.clear()
    status, said, err = typed("run", source, out, file)
    assert status == 0, err
    assert said.count("up to date") == 2, "neither made nor pushed again"
    assert "transformers reads" not in err
    assert not hub.writes("/commit/", "/repos/create")
    assert len(hub.repos[REPO].history) == 1

    ids = torch.arange(12)[None]
    with torch.inference_mode():
        there = AutoModelForCausalLM.from_pretrained(REPO)(ids).logits
        here = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    assert hub.bodies(".safetensors")
    assert torch.equal(there, here)


def test_what_stands_in_the_way_is_told_before_any_work(
    hub: Hub, typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = licensed(tmp_path / "source"), tmp_path / "out"
    packed = f"{PASSES}- pack: {{}}\n"
    cases = [
        (
            PASSES,
            f"push: {{repo: {REPO}}}\n",
            ("recipe.yaml:4:1", "packed weights, which a reader loads", "make pack the last pass"),
        ),
        (packed, f"push: {{repos: {REPO}}}\n", ("push.repos", "did you mean 'repo'")),
        (
            packed,
            f"push: {{repo: {REPO}, reader: gptqmodel}}\n",
            ("push.reader", "one that reads compressed-tensors: transformers"),
        ),
        (packed, f"- push: {{repo: {REPO}}}\n", ("push, which is none", "write it below them")),
        (
            packed,
            f"push: {{repo: {REPO}, license: mit}}\n",
            ("recipe.yaml:5:1: push.license", "the source's licence, apache-2.0"),
        ),
        (packed, "push: {repo: sumeone/x}\n", ("did you mean 'someone'",)),
    ]
    for passes, push, parts in cases:
        for verb in (["plan", source], ["run", source, out]):
            status, _, err = typed(*verb, recipe(tmp_path, passes, push))
            assert status == 2, err
            for part in parts:
                assert part in err
    monkeypatch.delenv("HF_TOKEN")
    for verb in (["plan", source], ["run", source, out]):
        status, _, err = typed(*verb, recipe(tmp_path))
        assert status == 6
        assert "a login at 127.0.0.1" in err
    assert not out.exists()
    assert not hub.writes()


def test_a_push_that_fails_leaves_the_artifact(hub: Hub, typed: Typed, tmp_path: Path) -> None:
    from hub_server import Fault

    hub.faults = [Fault("POST", "/repos/create", 403)]
    file = recipe(tmp_path, push=f"push: {{repo: {REPO}, unverified: true}}\n")
    status, _, err = typed("run", licensed(tmp_path / "source"), tmp_path / "out", file)
    assert status == 6
    assert f"{tmp_path / 'out'} is complete" in err
    assert f"compress push {tmp_path / 'out'} {REPO} --unverified" in err
    assert typed("run", tmp_path / "source", tmp_path / "out", file)[0] == 0
    same(hub, tmp_path / "out")
    assert "**Unverified.**" in hub.files(REPO)["README.md"].read_text()


def test_a_run_in_python_pushes_too(hub: Hub, tmp_path: Path) -> None:
    import compress

    file = recipe(tmp_path, push=f"push: {{repo: {REPO}, unverified: true}}\n")
    result = compress.run(file, licensed(tmp_path / "source"), tmp_path / "out")
    same(hub, result.out)


def test_plan_and_run_of_a_model_of_the_hub(hub: Hub, typed: Typed, tmp_path: Path) -> None:
    source = licensed(tmp_path / "source")
    hub.add("org/tiny", source, {"license": "apache-2.0"}, "v1")
    hub.repos["org/tiny"].revisions["main"] = "0" * 40
    hub.repos["org/tiny"].commits["0" * 40] = tmp_path / "nothing"
    status, _, err = typed("plan", "org/tiny@v1", "-p", RECIPE)
    assert status == 0, err
    weights = hub.bodies(".safetensors")
    assert weights
    assert all(request.range for request in weights)
    assert sum(request.sent for request in weights) < (source / "model.safetensors").stat().st_size / 10
    assert typed("run", "org/tiny@v1", tmp_path / "hub", "-p", RECIPE, "--quiet")[0] == 0
    assert typed("run", source, tmp_path / "local", "-p", RECIPE, "--quiet")[0] == 0
    there, here = tree(tmp_path / "hub"), tree(tmp_path / "local")
    assert there["model.safetensors"] == here["model.safetensors"]


HOSTILE = ("../../x.json", "/etc/x.json", "a\\..\\x.json", "x\0.json", "a/../x.json", "a//x.json", "C:x.json", "x\n.json", "")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_listing_with_a_hostile_name_is_refused_before_a_byte_is_written(
    name: str, hub: Hub, typed: Typed, tmp_path: Path
) -> None:
    hub.add("org/tiny", licensed(tmp_path / "source"))
    hub.repos["org/tiny"].listed = [name]
    before = sorted(tmp_path.rglob("*"))
    for verb in (["plan", "org/tiny"], ["run", "org/tiny", tmp_path / "out"]):
        status, out, err = typed(*verb, "-p", RECIPE)
        assert (status, out) == (3, ""), err
        assert "names of files inside the repository" in err
        assert "refused: do not use this model" in err
    assert sorted(tmp_path.rglob("*")) == before
    assert not hub.bodies()
    assert not os.path.lexists(tmp_path.parent / "x.json")
