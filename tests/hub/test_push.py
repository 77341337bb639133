"""Push: what a user types and reads, by the Hub's own client: repositories, branches, cards, refusals, dry runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from compress.checkpoint.reader import ADAPTER_CONFIG
from compress.evaluate.records import VERIFICATION
from hub_artifact import RECIPE, REPO, Typed, licensed, same, verified
from hub_server import Hub
from support import CALIBRATE, run


def card_of(hub: Hub, repo: str = REPO, revision: str = "main") -> tuple[dict[str, Any], str]:
    """Metadata and text of the README on the Hub."""
    import yaml

    _, head, text = hub.files(repo, revision)["README.md"].read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_a_push_makes_the_repository_and_one_commit(hub: Hub, artifact: Path, typed: Typed) -> None:
    before = {path: path.read_bytes() for path in artifact.rglob("*") if path.is_file()}
    status, out, err = typed("push", artifact, REPO, "--private", "--message", "First")
    assert status == 0, err
    assert f"pushed:   {hub.url}/{REPO}" in out
    assert "verified: transformers" in out
    assert "licence:  apache-2.0" in out
    same(hub, artifact)
    repo = hub.repos[REPO]
    assert repo.private
    assert [(header["summary"], header["revision"]) for header in repo.history] == [("First", "main")]
    metadata, text = card_of(hub)
    assert metadata["license"] == "apache-2.0"
    assert "Unverified" not in text
    assert before == {path: path.read_bytes() for path in artifact.rglob("*") if path.is_file()}, "the artifact stays as it was"
    shards = list(artifact.glob("*.safetensors"))
    assert len(hub.writes("/lfs/")) == 1 + 2 * len(shards) > 3, "asked once; each shard put and verified"
    assert not any(request.authorized for request in hub.requests if request.method == "PUT"), "storage gets no token"

    hub.requests.clear()
    status, out, _ = typed("push", artifact, REPO, "--message", "Second")
    assert (status, out) == (0, f"up to date: {hub.url}/{REPO}\n")
    assert len(repo.history) == 1
    assert not hub.writes("/commit/", "/repos/create")
    assert not [request for request in hub.requests if request.method == "PUT"]


def test_a_dry_run_says_what_would_be_pushed_and_writes_nothing(hub: Hub, artifact: Path, typed: Typed) -> None:
    status, out, err = typed("push", artifact, REPO, "--dry-run")
    assert status == 0, err
    said = " ".join(out.split())
    assert f"where: {REPO}, a new repository, at main" in said
    assert "login: someone" in said
    assert "license: apache-2.0" in said
    assert "nothing was written" in said
    for path in artifact.iterdir():
        assert re.search(rf"^{re.escape(path.name)} +[\d,]+$", out, re.MULTILINE), path.name
    assert not hub.writes()
    assert not hub.repos
    status, out, _ = typed("push", artifact, REPO, "--dry-run", "--json")
    assert json.loads(out)["files"][VERIFICATION] == (artifact / VERIFICATION).stat().st_size


def test_a_branch_and_a_pull_request(hub: Hub, artifact: Path, typed: Typed) -> None:
    assert typed("push", artifact, REPO)[0] == 0
    (artifact / "README.md").write_text("# Mine\n")
    assert typed("push", artifact, REPO, "--revision", "v2")[0] == 0
    assert "# Mine" in card_of(hub, revision="v2")[1]
    assert "# Mine" not in card_of(hub)[1]
    for _ in range(2):  # the second time nothing is left to do
        status, out, err = typed("push", artifact, REPO, "--pr", "--message", "Mine")
        assert status == 0, err
    assert "up to date" in out
    assert [pull["title"] for pull in hub.repos[REPO].pulls] == ["Mine"]
    assert "# Mine" in card_of(hub, revision="refs/pr/1")[1]
    (artifact / "README.md").write_text("# Mine, again\n")
    assert typed("push", artifact, REPO, "--pr", "--message", "Mine")[0] == 0
    assert len(hub.repos[REPO].pulls) == 1
    assert "again" in card_of(hub, revision="refs/pr/1")[1]


def test_files_of_an_earlier_push_that_a_reader_would_take_are_removed(
    hub: Hub, artifact: Path, typed: Typed, tmp_path: Path
) -> None:
    assert typed("push", artifact, REPO)[0] == 0
    single = run(licensed(tmp_path / "source"), tmp_path / "single", RECIPE).out
    verified(single)
    status, out, err = typed("push", single, REPO)
    assert status == 0, err
    assert out.count("of an earlier push") == len(list(artifact.glob("model*"))) > 2, "shards and their index"
    same(hub, single)


REFUSALS: dict[str, tuple[list[str], int, list[str]]] = {
    "no owner": (["tiny"], 2, ["push.repo", "OWNER/NAME", "'tiny'"]),
    "a URL": (["https://hub/someone/tiny"], 2, ["OWNER/NAME"]),
    "an owner that is nobody": (
        ["sumeone/tiny"],
        2,
        ["an owner that someone may push to: someone, org", "did you mean 'someone'"],
    ),
    "a pull request to nothing": (["org/none", "--pr"], 3, ["no such repository", "leave --pr out"]),
    "a pull request to a branch": ([REPO, "--pr", "--revision", "v2"], 2, ["push.pr", "the revision v2", "leave one out"]),
    "another licence": ([REPO, "--license", "mit"], 2, ["--license", "the source's licence, apache-2.0", "'mit'"]),
    "an odd revision": ([REPO, "--revision", "../x"], 2, ["push.revision", "a branch, or refs/pr/N"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_each_refusal_comes_before_anything_is_written(case: str, hub: Hub, artifact: Path, typed: Typed) -> None:
    words, wanted, parts = REFUSALS[case]
    status, out, err = typed("push", artifact, *words)
    assert (status, out) == (wanted, ""), err
    for part in parts:
        assert part in err
    assert not hub.writes()


def test_who_may_not_push(hub: Hub, artifact: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.role = "read"
    status, _, err = typed("push", artifact, REPO)
    assert status == 6
    assert "one of someone that may only read" in err
    assert "hf auth login" in err
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    status, _, err = typed("push", artifact, REPO)
    assert status == 6
    assert "HTTP status 401: the token is not valid" in err
    assert "hf_other" not in err
    monkeypatch.delenv("HF_TOKEN")
    status, _, err = typed("push", artifact, REPO)
    assert status == 6
    assert "a login at 127.0.0.1" in err
    assert "no token" in err
    assert not hub.writes()


def test_a_repository_of_something_else_is_left_alone(hub: Hub, artifact: Path, typed: Typed, sound: Path) -> None:
    hub.add(REPO, sound.parent / "source")
    status, _, err = typed("push", artifact, REPO)
    assert status == 2
    assert "another model: model.safetensors" in err
    status, _, err = typed("push", artifact, REPO, "--private")
    assert "one that is there, and public" in err
    assert not hub.writes()
    status, _, err = typed("push", artifact, REPO, "--revision", "w4")
    assert status == 0, err
    same(hub, artifact, revision="w4")


def test_bytes_that_nobody_verified(hub: Hub, artifact: Path, typed: Typed) -> None:
    (artifact / VERIFICATION).unlink()
    status, _, err = typed("push", artifact, REPO)
    assert status == 3
    assert "a reader that has verified these bytes" in err
    assert f"compress verify {artifact} --reader transformers" in err
    assert not hub.writes()
    assert typed("push", artifact, REPO, "--unverified")[0] == 0
    assert "**Unverified.**" in card_of(hub)[1]
    # A record of other bytes is none.
    (artifact / VERIFICATION).write_text(json.dumps({"fingerprint": "0" * 64, "readers": {"transformers": {}}}))
    assert typed("push", artifact, REPO)[0] == 3


def test_bytes_that_have_changed_since(hub: Hub, artifact: Path, typed: Typed) -> None:
    shard = next(artifact.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    status, _, err = typed("push", artifact, REPO)
    assert status == 3
    assert "the bytes that manifest.json names" in err
    assert not hub.writes()


def test_files_that_are_not_of_the_artifact(hub: Hub, artifact: Path, typed: Typed) -> None:
    (artifact / "pytorch_model.bin").write_bytes(b"\x80")
    (artifact / "modeling.py").write_text("raise SystemExit")
    status, _, err = typed("push", artifact, REPO)
    assert status == 3
    assert "pytorch_model.bin" in err
    assert "modeling.py" in err
    (artifact / "pytorch_model.bin").unlink()
    (artifact / "modeling.py").unlink()
    (artifact / "secret").symlink_to("/etc/passwd")
    status, _, err = typed("push", artifact, REPO)
    assert status == 3
    assert "a link out of it" in err
    assert not hub.writes()


def test_codes_that_are_not_packed_and_what_is_no_artifact(hub: Hub, typed: Typed, tmp_path: Path) -> None:
    source = licensed(tmp_path / "source")
    codes = run(source, tmp_path / "codes", "quantize.rtn(scheme=w4a16g32)").out
    status, _, err = typed("push", codes, REPO)
    assert status == 3
    assert f"compress pack {codes} {codes}-packed; push that" in err
    status, _, err = typed("push", source, REPO)
    assert status == 3
    assert "hf upload" in err
    status, _, err = typed("push", tmp_path / "cods", REPO)
    assert status == 3
    assert "did you mean 'codes'?" in err
    assert not hub.writes()


def test_a_source_without_a_licence(hub: Hub, typed: Typed, tiny: Path, tmp_path: Path) -> None:
    out = run(tiny, tmp_path / "out", RECIPE).out
    verified(out)
    status, _, err = typed("push", out, REPO)
    assert status == 2
    assert "the source names no licence" in err
    assert "--license apache-2.0" in err
    assert not hub.writes()
    assert typed("push", out, REPO, "--license", "mit")[0] == 0
    assert card_of(hub)[0]["license"] == "mit"
    # The Hub's own word about the card.
    status, _, err = typed("push", out, REPO, "--license", "mti")
    assert status == 3
    assert '"license" must be one of' in err


def test_a_licence_of_its_own_and_a_gated_source(hub: Hub, typed: Typed, tmp_path: Path) -> None:
    source = licensed(tmp_path / "source", "license: other\nlicense_name: tongyi\nlicense_link: LICENSE")
    hub.add("org/base", source, {"license": "other", "license_name": "tongyi"})
    status, _, err = typed("run", "org/base", tmp_path / "out", "-p", RECIPE, "--quiet")
    assert status == 0, err
    hub.repos["org/base"].gated = True
    verified(tmp_path / "out")
    status, out, err = typed("push", tmp_path / "out", REPO)
    assert status == 0, err
    assert "gated:    org/base, the base model" in out
    metadata, text = card_of(hub)
    assert metadata["license"] == "other"
    assert (metadata["license_name"], metadata["license_link"]) == ("tongyi", "LICENSE")
    assert metadata["base_model"] == "org/base"
    assert "The base model `org/base` is gated." in text


def test_an_adapter_names_the_repository_as_its_base(hub: Hub, typed: Typed, tmp_path: Path) -> None:
    recipe = "quantize.loftq(scheme=nf4g16, rank=2) | pack(format=peft)"
    out = run(licensed(tmp_path / "source"), tmp_path / "out", recipe).out
    verified(out)
    status, _, err = typed("push", out, REPO)
    assert status == 0, err
    there = json.loads(hub.files(REPO)[ADAPTER_CONFIG].read_text())
    assert there["base_model_name_or_path"] == REPO
    assert json.loads((out / ADAPTER_CONFIG).read_text()) == {**there, "base_model_name_or_path": str(out)}


def test_calibration_tokens_that_are_pushed_are_told(hub: Hub, typed: Typed, demo_model: Path, tmp_path: Path) -> None:
    out = run(demo_model, tmp_path / "out", f"{CALIBRATE} | prune.wanda(sparsity=2:4)").out
    verified(out)
    status, _, err = typed("push", out, REPO, "--dry-run", "--license", "apache-2.0")
    assert status == 0, err
    assert "note: push: the token ids of the calibration text are pushed with it" in err


def test_hidden_files_stay_here_and_folders_go_along(hub: Hub, artifact: Path, typed: Typed) -> None:
    (artifact / ".git").mkdir()
    (artifact / ".git" / "config").write_text("secret")
    (artifact / ".env").write_text("secret")
    for folder in ("pictures", ".eval_results"):
        (artifact / folder).mkdir()
    (artifact / ".eval_results" / "task.yaml").write_text("- dataset: {}\n")
    (artifact / "pictures" / "bits.svg").write_text("<svg/>")
    status, _, err = typed("push", artifact, REPO)
    assert status == 0, err
    names = hub.files(REPO).keys()
    assert {"pictures/bits.svg", ".eval_results/task.yaml"} <= names
    assert not {".env", ".git/config"} & names
