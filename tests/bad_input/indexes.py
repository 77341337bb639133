"""Index files that name what is not there, or what is not theirs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_input.bench import Case

FILE, Q = "model.safetensors.index.json", "model.layers.0.self_attn.q_proj.weight"


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Changes the index's weight_map."""

    def spoil(model: Path) -> None:
        content = json.loads((model / FILE).read_text())
        change(content["weight_map"])
        (model / FILE).write_text(json.dumps(content))

    return spoil


def text(content: str) -> Callable[[Path], object]:
    """Another text for an index."""
    return lambda model: (model / FILE).write_text(content)


def shard(model: Path) -> Path:
    """The shard that has `Q`."""
    return model / json.loads((model / FILE).read_text())["weight_map"][Q]


def outside(model: Path) -> None:
    """A shard of the model's own lies beside it, and the index leads there."""
    secret = shard(model).rename(model.parent / "secret.safetensors")
    edit(lambda names: names.update(dict.fromkeys(names, f"../{secret.name}")))(model)


def link(target: str) -> Callable[[Path], object]:
    """A link in the place of a shard; `{file}` is where the shard has gone, beside the model."""

    def spoil(model: Path) -> None:
        file = shard(model)
        moved = file.rename(model.parent / "moved.safetensors")
        file.symlink_to(target.replace("{file}", str(moved)))

    return spoil


def loop(model: Path) -> None:
    file = shard(model)
    file.unlink()
    file.symlink_to(file.name)


def side_link(model: Path) -> None:
    (model.parent / "id_rsa").write_text("private")
    (model / "notes.txt").symlink_to("../id_rsa")


def pipe(model: Path) -> None:
    file = shard(model)
    file.unlink()
    os.mkfifo(file)


def twice(model: Path) -> None:
    content = (model / FILE).read_text()
    entry = f'"{Q}": "{shard(model).name}",'
    (model / FILE).write_text(content.replace('"weight_map": {', '"weight_map": {' + entry))


def _case(said: tuple[str, ...], spoil: Callable[[Path], object]) -> Case:
    return Case(3, said, spoil=spoil, base="sharded")


OUT = "refused: a path out of it"
CASES = {
    "escape by ..": _case((FILE, "names of files in the same directory", "'../secret.safetensors'", OUT), outside),
    "absolute path": _case(("'/etc/passwd'", OUT), edit(lambda w: w.update({Q: "/etc/passwd"}))),
    "a file in a folder": _case(("'sub/model.safetensors'", OUT), edit(lambda w: w.update({Q: "sub/model.safetensors"}))),
    "the directory itself": _case(("'..'", OUT), edit(lambda w: w.update({Q: ".."}))),
    "an empty name": _case(("names of files in the same directory", "''"), edit(lambda w: w.update({Q: ""}))),
    "a number for a file": _case(("names of files in the same directory", "'3'"), edit(lambda w: w.update({Q: 3}))),
    "a pickle": _case(("safetensors files", "pytorch_model.bin"), lambda m: [(m / "pytorch_model.bin").touch(), edit(lambda w: w.update({Q: "pytorch_model.bin"}))(m)]),
    "a shard that links out": _case(("a link out of it", "copy the file itself there"), link("{file}")),
    "a shard that links nowhere": _case(("nowhere",), link("gone.safetensors")),
    "a shard that links to itself": _case(("nowhere",), loop),
    "a shard that links to a device": _case(("a link out of it",), link("/dev/zero")),
    "a shard that is a pipe": _case(("a pipe, a socket or a device",), pipe),
    "another file that links out": _case(("notes.txt", "a link out of it", "copy the file itself there"), side_link),
    "missing shard": _case(("every file that it names", "missing: model-", "fetch them"), lambda m: shard(m).unlink()),
    "a tensor that no shard has": _case(("'ghost' in model-", "no shard has it"), edit(lambda w: w.update(ghost=w[Q]))),
    "a tensor that it does not name": _case(("every tensor of its shards", f"1 that it does not name: {Q}"), edit(lambda w: w.pop(Q))),
    "the wrong shard": _case((f"'{Q}' in model-", "it is in model-", "fetch the checkpoint again"), edit(lambda w: w.update({Q: w["lm_head.weight"]}))),
    "a list for a weight_map": _case((FILE, "a weight_map", "none"), text('{"weight_map": ["model.safetensors"]}')),
    "no weight_map": _case((FILE, "a weight_map", "none"), text("{}")),
    "an empty weight_map": _case((FILE, "a weight_map", "none"), text('{"weight_map": {}}')),
    "a tensor twice": _case((FILE, "a JSON object", f"the key '{Q}' occurs twice"), twice),
    "no JSON": _case((FILE, "a JSON object"), text("<html>")),
    "deeply nested": _case((FILE, "a JSON object", "nested more than 100 levels"), text('{"weight_map":' * 100_000)),
    "a list": _case((FILE, "a JSON object", "list"), text("[]")),
}  # fmt: skip
