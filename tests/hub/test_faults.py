"""Faults: a Hub that is busy, refuses, or hangs up in the middle of a file; a push that is repeated ends in one correct repository."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from hub_artifact import REPO, Typed, same
from hub_server import Fault, Hub


def puts(hub: Hub, status: int = 200) -> list[str]:
    """The objects that were put, one for each time."""
    return [request.path.split("/")[2] for request in hub.requests if request.method == "PUT" and request.status == status]


def test_too_many_requests_are_waited_for(hub: Hub, artifact: Path, typed: Typed, waited: list[float]) -> None:
    hub.faults = [
        Fault("GET", "/whoami", 429, headers={"Retry-After": "2"}),
        Fault("POST", "/repos/create", 429, headers={"Retry-After": "3"}),
        Fault("POST", "/preupload/", 429, headers={"Retry-After": "4"}),
        Fault("PUT", "/lfs/", 429, headers={"Retry-After": "5"}),
        Fault("POST", "/commit/", 429, headers={"Retry-After": "6"}),
    ]
    status, _, err = typed("push", artifact, REPO)
    assert status == 0, err
    assert sorted(waited) == [2, 3, 4 + 1, 5 + 1, 6], "the library adds a second of its own"
    assert err.count("note: push: 127.0.0.1 is busy") >= 5
    same(hub, artifact)
    assert len(hub.repos[REPO].history) == 1


def test_too_many_requests_for_too_long(hub: Hub, artifact: Path, typed: Typed, waited: list[float]) -> None:
    hub.faults = [Fault("POST", "/commit/", 429, times=100)]
    status, _, err = typed("push", artifact, REPO)
    assert status == 6
    assert "HTTP status 429: too many requests, for too long" in err
    assert sum(waited) > 100
    hub.faults.clear()
    assert typed("push", artifact, REPO)[0] == 0
    same(hub, artifact)


def test_a_connection_that_is_cut_in_the_middle_of_a_file(hub: Hub, artifact: Path, typed: Typed, waited: list[float]) -> None:
    """The file is sent again; where that is of no use, a second push sends that file alone."""
    shards = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in artifact.glob("*.safetensors")}
    broken, *whole = shards
    hub.cut_after, hub.cuts, hub.cut_path = 1000, 1000, broken
    status, _, err = typed("push", artifact, REPO)
    assert status == 6
    assert "the connection was cut" in err
    assert "what has been uploaded is not uploaded twice" in err
    assert 0 < max(request.sent for request in hub.requests if request.method == "PUT" and broken in request.path) <= 1000
    assert sorted(puts(hub)) == sorted(whole)
    assert not hub.repos[REPO].history
    hub.requests.clear()
    hub.cuts = 1
    status, _, err = typed("push", artifact, REPO)
    assert status == 0, err
    assert puts(hub) == [broken]
    assert "is busy: Retrying" in err
    same(hub, artifact)
    assert len(hub.repos[REPO].history) == 1


def test_files_in_parts(hub: Hub, artifact: Path, typed: Typed) -> None:
    hub.part_bytes = 10_000
    assert typed("push", artifact, REPO)[0] == 0
    assert len(puts(hub)) > len(list(artifact.glob("*.safetensors")))
    same(hub, artifact)


CASES = {
    "401": (Fault("POST", "/commit/", 401), "HTTP status 401: the token is not valid", "hf auth login"),
    "403": (Fault("POST", "/preupload/", 403), "HTTP status 403: this one may not", "--pr"),
    "gated": (Fault("POST", "/preupload/", 403, headers={"X-Error-Code": "GatedRepo"}), "it is gated", "ask for access"),
    "409": (Fault("POST", "/commit/", 409), "HTTP status 409: somebody is", "run it again"),
    "412": (Fault("POST", "/commit/", 412), "HTTP status 412: somebody is", "run it again"),
    "500": (Fault("POST", "/commit/", 500), "HTTP status 500", "run it again"),
    "503": (Fault("GET", "/api/models/", 503), "HTTP status 503", "run it again"),
    "no JSON": (Fault("POST", "/preupload/", 200), "something else", "check HF_ENDPOINT"),
    "create": (Fault("POST", "/repos/create", 403), "HTTP status 403", "hf auth login"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_failure_says_what_to_do_and_the_same_push_goes_on(
    case: str, hub: Hub, artifact: Path, typed: Typed, waited: list[float]
) -> None:
    fault, got, do = CASES[case]
    hub.faults = [fault]
    status, _, err = typed("push", artifact, REPO)
    assert status == 6, err
    assert err.startswith("error: ") or "\nerror: " in err
    for part in ("expected:", f"got:      {got}"[:16], got, "do:", do):
        assert part in err
    status, _, err = typed("push", artifact, REPO)
    assert status == 0, err
    same(hub, artifact)
    assert len(hub.repos[REPO].history) == 1


def test_a_repository_that_somebody_has_made_meanwhile(hub: Hub, artifact: Path, typed: Typed) -> None:
    assert typed("push", artifact, REPO)[0] == 0
    (artifact / "README.md").write_text("# Mine\n")
    hub.faults = [Fault("GET", f"/api/models/{REPO}", 404, headers={"X-Error-Code": "RepoNotFound"})]
    status, _, err = typed("push", artifact, REPO)
    assert status == 0, err
    assert [r.status for r in hub.requests if r.path == "/api/repos/create"] == [200, 409]
    assert "# Mine" in hub.files(REPO)["README.md"].read_text()


def test_a_repository_of_others(hub: Hub, artifact: Path, typed: Typed, tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "README.md").write_text("# Else\n")
    hub.add("else/model", tmp_path / "else")
    status, _, err = typed("push", artifact, "else/model")
    assert status == 6
    assert "a token that may write there" in err
    assert "--pr" in err
    status, out, err = typed("push", artifact, "else/model", "--pr")
    assert status == 0, err
    assert "else/model/discussions/1" in out
    same(hub, artifact, "else/model", "refs/pr/1")
    assert hub.files("else/model")["README.md"].read_text() == "# Else\n"


def test_no_hub_at_all(hub: Hub, artifact: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    status, _, err = typed("push", artifact, REPO)
    assert status == 6
    assert "HF_HUB_OFFLINE is set" in err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    status, _, err = typed("push", artifact, REPO)
    assert status == 6
    assert "no connection (ConnectError)" in err
