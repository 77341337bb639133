"""Source: a Hub model gives what its directory gives, a plan reads headers only, and each failure says what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

from compress.architecture.weight_map import resolve
from compress.checkpoint.reader import Checkpoint
from compress.checkpoint.source import open_headers, open_source
from compress.errors import CompressError, InputError, MachineError
from compress.pipeline.plan import PlanOptions, make_plan
from compress.spec.recipe import parse_one_liner
from hub_server import SIGNATURE, Hub, serve
from support import run, tiny_llama, tree

RECIPE = "quantize.rtn(scheme=w4a16g32) | pack"
NAME = "someone/tiny"
TOKEN = "hf_secret123"
Opener = Callable[[str], Checkpoint]
CARD = {"license": "apache-2.0", "datasets": ["org/corpus", "org/more"], "tags": ["tiny"]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no token of this machine, and an empty working directory."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    with serve() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


def directory(path: Path, shard_size: str = "5GB", **sizes: int) -> Path:
    """A tiny model with the files that stand beside one."""
    tiny_llama(path, shard_size, **sizes)
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "tokenizer_config.json").write_text("{}")
    (path / "merges.txt").write_text("a b\n")
    (path / "tokenizer.model").write_bytes(b"\x00\x01")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "LICENSE").write_text("Apache")
    (path / "README.md").write_text("---\nlicense: apache-2.0\ndatasets: [org/corpus, org/more]\n---\n# Tiny\n")
    return path


@pytest.fixture(params=["5GB", "60KB"], ids=["single", "sharded"])
def local(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return directory(tmp_path / "local", request.param)


def publish(hub: Hub, local: Path, name: str = NAME, revision: str = "main") -> str:
    """Puts a copy of `local` on the Hub, amid what must not be fetched."""
    there = local.parent / f"{name.replace('/', '--')}@{revision}"
    shutil.copytree(local, there)
    (there / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    for code in ("modeling_tiny.py", "tokenizer_tiny.py"):
        (there / code).write_text("raise SystemExit('ran')\n")
    for pickle in ("pytorch_model.bin", "optimizer.pt", "tf_model.h5", "tokenizer.pkl"):
        (there / pickle).write_bytes(b"\x80\x04." * 100)
    (there / "model.fp16.safetensors").write_bytes(b"another variant")
    (there / "onnx").mkdir()
    (there / "onnx" / "config.json").write_text("{}")
    return hub.add(name, there, CARD, revision)


def test_a_hub_model_gives_the_artifact_of_its_directory(hub: Hub, local: Path, tmp_path: Path) -> None:
    commit = publish(hub, local)
    source = open_source(NAME)
    assert source.name == NAME
    assert source.origin == {"commit": commit, "licence": "apache-2.0", "datasets": ["org/corpus", "org/more"]}
    ours = run(source, tmp_path / "hub out", RECIPE).manifest
    theirs = run(local, tmp_path / "local out", RECIPE).manifest
    fetched, expected = tree(tmp_path / "hub out"), tree(tmp_path / "local out")
    assert fetched.pop("manifest.json") != expected.pop("manifest.json")
    assert fetched == expected
    assert {"LICENSE", "chat_template.jinja", "merges.txt", "tokenizer.model"} <= set(fetched)
    assert (ours.digests, ours.files) == (theirs.digests, theirs.files)
    assert ours.source.model_dump() == {
        "name": NAME, "commit": commit, "licence": "apache-2.0", "licence_name": None, "licence_link": None, "datasets": ("org/corpus", "org/more"),
        "fingerprint": theirs.source.fingerprint,
    }  # fmt: skip


def test_only_what_an_artifact_carries_is_fetched(hub: Hub, local: Path, cache: Path) -> None:
    publish(hub, local)
    source = open_source(NAME)
    wanted = {path.name for path in local.iterdir()}
    assert {Path(request.path).name for request in hub.bodies()} == wanted
    assert {path.name for path in cache.rglob("snapshots/*/*")} == wanted
    assert source.left_behind == (
        "model.fp16.safetensors", "optimizer.pt", "pytorch_model.bin", "tf_model.h5", "tokenizer.pkl",
        "modeling_tiny.py", "onnx/", "tokenizer_tiny.py",
    )  # fmt: skip


def test_python_is_fetched_only_for_a_model_that_is_trusted(hub: Hub, local: Path) -> None:
    publish(hub, local)
    code = {"modeling_tiny.py", "tokenizer_tiny.py"}
    for opener in (open_headers, open_source):
        assert not code & set(opener(NAME).side_files)
    assert not hub.bodies(".py")
    for trusting in (open_headers, open_source):
        assert code <= set(trusting(NAME, trusted=True).side_files)
        assert all((trusting(NAME, trusted=True).path / file).is_file() for file in code)
    assert not hub.bodies(".bin")


def test_other_files_in_the_cache_change_nothing(hub: Hub, local: Path) -> None:
    publish(hub, local)
    first = open_source(NAME)
    (first.path / "modeling_tiny.py").write_text("put here by another program")
    (first.path / "notes.txt").write_text("and this")
    assert open_source(NAME).side_files == first.side_files


def test_headers_are_those_of_the_source_and_nothing_else_is_read(hub: Hub, tmp_path: Path) -> None:
    local = directory(tmp_path / "local", "1MB", vocab_size=20_000, hidden_size=256)
    publish(hub, local)
    headers = open_headers(NAME)
    bodies = hub.bodies()
    shards = hub.bodies(".safetensors")
    assert {Path(r.path).name for r in bodies} - {Path(r.path).name for r in shards} == {
        "config.json",
        "model.safetensors.index.json",
    }
    assert all(r.range for r in shards)
    total = sum(path.stat().st_size for path in local.iterdir())
    assert sum(r.sent for r in hub.requests) < total / 100
    payloads = {shard: min(r.offset for r in headers.refs.values() if r.file == shard) for shard in shard_names(headers)}
    assert {r.path.rpartition("/")[2]: 0 for r in shards}.keys() == payloads.keys()
    assert all(int(r.range.rpartition("-")[2]) < payloads[Path(r.path).name] for r in shards)
    plan = make_plan(parse_one_liner(RECIPE), headers, resolve(headers), PlanOptions(2))
    assert plan.steps[-1].payload_bytes > 0

    source = open_source(NAME)
    assert headers.refs == source.refs
    for name in ("config", "side_files", "left_behind", "name", "origin", "manifest"):
        assert getattr(headers, name) == getattr(source, name)


def shard_names(checkpoint: Checkpoint) -> set[str]:
    return {ref.file for ref in checkpoint.refs.values()}


def test_headers_of_a_fetched_model_come_from_the_cache(hub: Hub, local: Path) -> None:
    publish(hub, local)
    source = open_source(NAME)
    hub.requests.clear()
    assert open_headers(NAME).refs == source.refs
    assert not hub.bodies()


def test_a_canonical_checkpoint_on_the_hub_is_known_by_its_manifest(hub: Hub, tmp_path: Path) -> None:
    run(directory(tmp_path / "local"), tmp_path / "canonical", "quantize.rtn(scheme=w4a16g32)")
    hub.add(NAME, tmp_path / "canonical")
    headers = open_headers(NAME)
    assert headers.manifest is not None
    assert headers.manifest.format == "canonical"
    assert headers.logical == open_source(NAME).logical


def test_a_revision_is_pinned(hub: Hub, tmp_path: Path) -> None:
    commits = {}
    for revision, hidden in (("main", 64), ("v1", 32), ("refs/pr/2", 96)):
        local = directory(tmp_path / revision.replace("/", "-"), hidden_size=hidden)
        commits[revision] = publish(hub, local, NAME, revision.replace("/", "-"))
        hub.repos[NAME].revisions[revision] = commits[revision]
    for revision, hidden in (("v1", 32), ("refs/pr/2", 96), (commits["v1"], 32)):
        for opened in (open_headers(f"{NAME}@{revision}"), open_source(f"{NAME}@{revision}")):
            assert opened.config["hidden_size"] == hidden
            assert opened.origin["commit"] == commits.get(revision, revision)
            assert opened.name == NAME
    asked = {r.path for r in hub.requests if "/resolve/" in r.path}
    assert all(any(f"/resolve/{commit}/" in path for commit in commits.values()) for path in asked)


def test_a_name_without_owner(hub: Hub, tmp_path: Path) -> None:
    publish(hub, directory(tmp_path / "local"), "gpt")
    assert open_headers("gpt").name == "gpt"


@pytest.mark.parametrize(
    ("card", "licence", "datasets"),
    [
        ({}, None, []),
        ({"license": "other", "license_name": "tongyi", "datasets": "org/one"}, "tongyi", ["org/one"]),
        ({"license": ["mit", "bsd"], "datasets": [None, {"x": 1}, "org/one"]}, "mit, bsd", ["org/one"]),
        ({"license": {"odd": 1}, "datasets": 3}, None, []),
    ],
)
def test_cards_of_every_kind(hub: Hub, tiny: Path, card: dict[str, object], licence: str | None, datasets: list[str]) -> None:
    hub.add(NAME, tiny, card)
    origin = open_headers(NAME).origin
    assert (origin["licence"], origin["datasets"]) == (licence, datasets)


def test_offline_the_cache_is_enough(hub: Hub, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    publish(hub, local)
    online = open_source(NAME)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for opened in (open_source(NAME), open_headers(NAME)):
        assert (opened.refs, opened.side_files, opened.left_behind) == (online.refs, online.side_files, online.left_behind)
        assert opened.origin == online.origin
    assert not hub.requests


@pytest.mark.parametrize("opener", [open_source, open_headers])
def test_a_local_directory_needs_no_hub(opener: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = directory(tmp_path / "home" / "owner" / "model")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for text in (str(local), "owner/model", "./owner/model", "~/owner/model"):
        assert opener(text).name == "model"


@pytest.mark.parametrize("text", ["./nowhere", "../no/where", "/no/where", "~/nowhere", "a/b/c", "owner/nowhere", "."])
@pytest.mark.parametrize("opener", [open_source, open_headers])
def test_a_path_that_is_not_there(opener: Opener, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd" / "owner").mkdir()
    with pytest.raises(InputError) as caught:
        opener(text)
    problem = caught.value.problems[0]
    assert "no such directory" in problem.got or text == "."
    if text == "owner/nowhere":
        assert "owner/nowhere@main" in problem.do


def said(model: str, kind: type[CompressError], opener: Opener = open_headers) -> str:
    """The message of the error that `model` gives; no message holds a token, a URL's query or a chained traceback."""
    with pytest.raises(kind) as caught:
        opener(model)
    error = caught.value
    assert type(error) is kind
    assert error.__suppress_context__ or error.__context__ is None
    problem = error.problems[0]
    assert problem.where and problem.expected and problem.got  # noqa: PT018
    for secret in (TOKEN, SIGNATURE, "Authorization", "/storage/"):
        assert secret not in str(error)
    return str(error)


def test_what_is_no_model_name(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "cwd" / "model.bin").write_text("x")
    assert "a file" in said("model.bin", InputError)
    assert "owner/name" in said("https://user:hf_secret123@hub.example/owner/name", InputError)
    for odd in ("", "a b", "-x", "owner/"):
        assert "owner/name" in said(odd, InputError)
    assert "'@'" in said("owner/name@", InputError)
    assert not hub.requests


@pytest.mark.parametrize("opener", [open_source, open_headers])
@pytest.mark.parametrize("token", [None, TOKEN])
def test_each_refusal_of_the_hub(
    hub: Hub, tiny: Path, opener: Opener, token: str | None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    text = said("someone/else", InputError, opener)
    assert "neither, or a private one" in text
    assert "HF_TOKEN" in text
    hub.add(NAME, tiny)
    assert "no revision 'v9'" in said(f"{NAME}@v9", InputError, opener)
    hub.repos[NAME].gated = True
    text = said(NAME, MachineError, opener)
    assert ("the token in use has no access" if token else "no token is set") in text
    assert "ask for access" in text
    assert "HF_TOKEN" in text
    assert any(r.authorized for r in hub.requests) == bool(token)
    out = capfd.readouterr()
    assert TOKEN not in out.out + out.err


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_hub_out_of_order(hub: Hub, tiny: Path, status: int) -> None:
    hub.add(NAME, tiny)
    hub.status = status
    text = said(NAME, MachineError)
    assert f"HTTP status {status}" in text
    assert ("HF_TOKEN" in text) == (status < 500)


@pytest.mark.parametrize("opener", [open_source, open_headers])
def test_no_connection(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://someone:hf_secret123@127.0.0.1:9")
    text = said(NAME, MachineError, opener)
    assert "no connection" in text
    assert "127.0.0.1" in text
    assert "HF_HUB_OFFLINE=1" in text


@pytest.mark.parametrize("opener", [open_source, open_headers])
def test_offline_without_the_model(hub: Hub, opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = said(NAME, InputError, opener)
    assert "no such directory, and nothing of it in the cache" in text
    assert "unset HF_HUB_OFFLINE" in text
    assert not hub.requests


@pytest.mark.parametrize("path", ["runs/w4/out", "my.model", "~nobody/model", "/nowhere/model", "./owner/name"])
def test_a_path_that_is_not_there_is_a_missing_directory(hub: Hub, path: str) -> None:
    assert "no such directory" in said(path, InputError)
    assert not hub.requests


def test_offline_with_a_part_of_the_model(hub: Hub, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    publish(hub, local)
    open_headers(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for opener in (open_headers, open_source):
        assert "not all of it" in said(NAME, MachineError, opener)


@pytest.mark.parametrize("opener", [open_source, open_headers])
def test_a_repository_of_pickles_is_refused_unread(hub: Hub, local: Path, opener: Opener) -> None:
    publish(hub, local)
    there = hub.repos[NAME].commits[hub.repos[NAME].revisions["main"]]
    for file in there.glob("*.safetensors*"):
        file.unlink()
    text = said(NAME, InputError, opener)
    assert text.startswith(NAME + "\n")
    assert "a pickle can run code" in text
    assert not hub.bodies(".bin")


@pytest.mark.parametrize("opener", [open_source, open_headers])
def test_what_is_wrong_in_a_repository_is_named_by_its_id(hub: Hub, tmp_path: Path, opener: Opener) -> None:
    local = directory(tmp_path / "local", "60KB")
    commit = publish(hub, local)
    there = hub.repos[NAME].commits[commit]
    shard = next(there.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    text = said(NAME, InputError, opener)
    assert text.startswith(f"{NAME}/{shard.name}\n")
    assert "truncated" in text
    shard.unlink()
    other = hub.add("someone/missing", there)
    assert other != commit
    assert said("someone/missing", InputError, opener).startswith("someone/missing/model.safetensors.index.json\n")


def test_a_server_without_ranges_is_read_up_to_the_header(hub: Hub, tmp_path: Path) -> None:
    local = directory(tmp_path / "local", vocab_size=100_000, hidden_size=128)
    publish(hub, local)
    hub.ignores_range = True
    refs = open_headers(NAME).refs
    deadline = time.monotonic() + 20
    while len(hub.bodies(".safetensors")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    bodies = hub.bodies(".safetensors")
    assert [r.status for r in bodies] == [200, 200]
    assert all(r.sent < (local / "model.safetensors").stat().st_size / 2 for r in bodies)
    assert refs == open_source(str(local)).refs


def test_a_read_that_is_cut(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = directory(tmp_path / "local", vocab_size=4000)
    publish(hub, local)
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.cuts, hub.cut_after = 1, 3
    assert "the read was cut" in said(NAME, MachineError)
    hub.cuts, hub.cut_after = 1000, 0
    text = said(NAME, MachineError, open_source)
    assert "the read was cut" in text
    assert "what has been fetched is kept" in text
    hub.cuts, hub.cut_after = 2, 100_000
    assert open_source(NAME).refs == open_source(str(local)).refs


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: Hub, tmp_path: Path) -> None:
    """In a process of its own, as a user has it: HF_ENDPOINT and HF_TOKEN in the environment."""
    publish(hub, directory(tmp_path / "local"))
    script = (
        "import sys; from pathlib import Path; from compress.checkpoint.source import open_headers, open_source; from support import run\n"
        "assert 'torch' in sys.modules\n"
        f"open_headers({NAME!r}); run(open_source({NAME!r}), Path('out'), {RECIPE!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={
            **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_CACHE": str(tmp_path / "other cache"),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    asked = [request for request in hub.requests if NAME in request.path]
    assert not [request for request in asked if request.authorized == request.path.startswith("/storage/")]
    assert {request.path.startswith("/storage/") for request in asked} == {True, False}
    assert all(request.authorized is False for request in hub.requests if request not in asked)
    assert TOKEN not in done.stdout + done.stderr
    written = list((tmp_path / "out").iterdir())
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]["name"] == NAME
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)


def test_opening_imports_the_hub_only_for_a_hub_model(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    script = (
        "import sys; from compress.checkpoint.source import open_source; open_source(sys.argv[1])\n"
        "assert not {'torch', 'huggingface_hub', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)
