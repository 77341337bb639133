"""Names of the Hub's models that are not there, and Hubs that are out of order."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_input.bench import Case
from hub_server import Hub

NAME = "someone/tiny"
REST = "{out} -p 'quantize.rtn(scheme=w4a16g32) | pack'"


def there(gated: bool = False, **wrong: Any) -> Callable[[Hub, Path], None]:
    """The model is on the Hub, and what is wrong with it, or with the Hub."""

    def publish(hub: Hub, model: Path) -> None:
        hub.add(NAME, model)
        hub.repos[NAME].gated = gated
        for key, value in wrong.items():
            setattr(hub, key, value)

    return publish


SOUND = there()


def _case(name: str, status: int, *said: str, hub: Callable[[Hub, Path], object] | None = SOUND, **more: Any) -> Case:
    return Case(status, said, f"run {shlex.quote(name)} {REST}", hub=hub, **more)


def cut(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def pickles(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def config(model: Path) -> None:
    (model / "config.json").write_text("<html>")


CASES = {
    "absent": _case("someone/else", 3, "a directory here, or a model of 127.0.0.1", "neither, or a private one", "check the name"),
    "gated": _case(NAME, 6, "access to the model", "it is gated, and no token is set", "set HF_TOKEN", hub=there(gated=True)),
    "wrong revision": _case(f"{NAME}@v9", 3, f"a branch, tag or commit of {NAME}", "no revision 'v9'"),
    "no revision": _case(f"{NAME}@", 3, "a branch, tag or commit after '@'", "leave '@' out"),
    "offline": _case(NAME, 3, "a model that the Hub's cache has", "no such directory, and nothing of it in the cache", "unset HF_HUB_OFFLINE", hub=None),
    "spaces": _case("some one/tiny", 3, "a directory, or a Hub id like owner/name", "no such directory"),
    "two dots": _case("someone/..", 3, "a directory, or a Hub id like owner/name"),
    "three parts": _case("a/b/c", 3, "no such directory"),
    "a control character": _case("someone/ti\x07ny", 3, "a directory, or a Hub id like owner/name", "no such directory"),
    "empty": _case("", 3, "a directory, or a Hub id like owner/name", "neither"),
    "an option": Case(2, ("No such option",), f"run -x {REST}"),
    "a path that is not there": _case("./someone/tiny", 3, "a directory with config.json and safetensors", "no such directory"),
    "a file": _case("{model}/config.json", 3, "a directory with config.json", "a file", "name the directory that it is in"),
    "a URL": _case("https://user:hf_secret@huggingface.co/someone/tiny", 3, "a directory, or a Hub id", "a URL", "leave out all but owner/name", unsaid="hf_secret"),
    "a server that answers 500": _case(NAME, 6, "an answer of 127.0.0.1", "HTTP status 500", "run it again", hub=there(status=500)),
    "a server that answers 403": _case(NAME, 6, "HTTP status 403", "set HF_TOKEN to a valid token", hub=there(status=403)),
    "a page instead of JSON": _case(NAME, 6, "an answer of 127.0.0.1", "check HF_ENDPOINT and the proxy", hub=there(garbage=b"<html>")),
    "JSON of another kind": _case(NAME, 6, "an answer of 127.0.0.1", "check HF_ENDPOINT and the proxy", hub=there(garbage=b'["a"]')),
    "an object of nothing": _case(NAME, 6, "an answer of 127.0.0.1", "check HF_ENDPOINT and the proxy", hub=there(garbage=b"{}")),
    "JSON of wrong types": _case(NAME, 6, "an answer of 127.0.0.1", hub=there(garbage=json.dumps({"id": 3, "sha": [1], "siblings": 5}).encode())),
    "binary": _case(NAME, 6, "an answer of 127.0.0.1", hub=there(garbage=bytes(range(256)))),
    "damaged weights": _case(NAME, 3, f"{NAME}/model.safetensors", "as its header says", "truncated", spoil=cut),
    "pickles": _case(NAME, 3, NAME, "a pickle can run code when it is opened", spoil=pickles),
    "a config that is a page": _case(NAME, 3, f"{NAME}/config.json", "a JSON object", spoil=config),
}  # fmt: skip
