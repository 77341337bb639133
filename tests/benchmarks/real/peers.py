"""Peers: other tools' rows, each quantized in an environment of its own and measured by our protocol.

An environment is built once. What a peer has made is kept with its seconds under a key of its version, what it was asked for, and
the hashes of model and tokens, for it may have taken an hour; what is measured of it is measured anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint.cache import folder_of
from compress.errors import MachineError
from compress.evaluate import readers
from compress.evaluate.readers.environment import Environment, clean_variables, ensure, packages

from .ours import tensor_bytes
from .process import measure

_TORCH = "torch==2.13.0"


def _environment(name: str, *pins: str) -> Environment:
    return Environment(name, ((_TORCH,), (_TORCH, *pins)), needs_bytes=3 * 10**9)


PEERS: dict[str, Callable[[], Environment]] = {
    "llm-compressor": lambda: _environment("llm-compressor", "llmcompressor==0.14.0.1"),
    "gptqmodel": readers.gptqmodel,
    # It writes FP4 by compressed-tensors, on which it does not depend, and for which it asks at the end.
    "auto-round": lambda: _environment("auto-round", "auto-round==0.16.1", "compressed-tensors==0.20.1"),
}


@dataclass(frozen=True)
class PeerRow:
    """A peer and what it is asked for: symmetric codes, as each of them makes by default, or zeros by a method of its own."""

    peer: str
    bits: int = 0
    group: int = 0
    method: str = ""
    sparsity: str = ""
    form: str = ""
    """Codes that are no integers, nvfp4 or mxfp4; of weights alone."""
    activations: int = 0
    """Bits of activations, symmetric integers by token; 0 for none."""

    @property
    def scheme(self) -> str:
        """As its name has it."""
        return self.form or f"w{self.bits}{f'a{self.activations}' if self.activations else ''}g{self.group}"

    @property
    def name(self) -> str:
        if self.method:
            share = self.sparsity.replace(":", "-") if ":" in self.sparsity else f"{100 * float(self.sparsity):.0f}"
            return f"{self.peer}-{self.method}-{share}"
        return f"{self.peer}-{self.scheme}"

    def version(self) -> str:
        """The peer's, as its environment pins it."""
        pins = PEERS[self.peer]().pins()
        return pins[{"llm-compressor": "llmcompressor"}.get(self.peer, self.peer)]

    def told(self, iters: int) -> str:
        """What it is asked for, in words."""
        if self.method:
            return f"{self.peer} {self.version()}: {self.method}, sparsity {self.sparsity}"
        tuned = f", {iters} iterations" if self.peer == "auto-round" else ""
        if self.form:
            return f"{self.peer} {self.version()}: {self.form}{tuned}"
        return f"{self.peer} {self.version()}: w{self.bits}a{self.activations or 16}g{self.group}, symmetric{tuned}"

    def key(self, iters: int, model: str, ids: str) -> str:
        """`<name>-<hash>`; `model` and `ids` are sha256 of what it is given."""
        asked = [self.peer, PEERS[self.peer]().key(), self.bits, self.group, iters if self.peer == "auto-round" else None]
        asked += [self.method, self.sparsity] if self.method else []
        asked += [self.form, self.activations] if self.form or self.activations else []
        return f"{self.name}-{hashlib.sha256(json.dumps([*asked, model, ids]).encode()).hexdigest()[:12]}"


PEER_ROWS = (
    *(PeerRow(peer, bits, group) for peer in PEERS for bits, group in ((3, 64), (3, 32), (2, 64), (2, 32), (4, 32))),
    *(PeerRow(peer, form=form) for peer in ("llm-compressor", "auto-round") for form in ("nvfp4", "mxfp4")),
    *(PeerRow("llm-compressor", 4, 64, activations=bits) for bits in (8, 4)),
    *(PeerRow("llm-compressor", method=m, sparsity=s) for m in ("sparsegpt", "wanda") for s in ("0.5", "0.7", "2:4")),
)


def quantized(
    row: PeerRow, iters: int, model: Path, model_hash: str, ids: Path, ids_hash: str, tell: Callable[[str], None]
) -> tuple[Path, dict[str, Any]]:
    """The peer's artifact and what making it took, from the cache if it is there. Raises MachineError."""
    place = folder_of("real") / "peers" / row.key(iters, model_hash, ids_hash)
    if (place / "made.json").is_file():
        tell(f"{row.name}: made before, {place}")
        return place / "artifact", json.loads((place / "made.json").read_text())
    python = ensure(PEERS[row.peer](), tell)
    place.parent.mkdir(parents=True, exist_ok=True)
    log, blocks = place.with_name(f"{place.name}.log"), place.with_name(f"{place.name}.blocks")
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f"{place.name}.tmp-") as scratch:
        made, request, answer = Path(scratch) / "made", Path(scratch) / "request.json", Path(scratch) / "answer.json"
        made.mkdir()
        asked = {
            "peer": row.peer, "model": str(model.absolute()), "ids": str(ids.absolute()), "bits": row.bits, "group": row.group,
            "iters": iters, "method": row.method, "sparsity": row.sparsity, "form": row.form, "activations": row.activations,
            "out": str(made / "artifact"), "answer": str(answer), "blocks": str(blocks),
        }  # fmt: skip
        request.write_text(json.dumps(asked))
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
        kept = dict.fromkeys(("HF_HOME", "XDG_CACHE_HOME", "TMPDIR"), scratch)
        command = [str(python), "-P", str(Path(__file__).with_name("peer_process.py")), str(request)]
        usage = measure(command, log, clean_variables(**offline, **kept), Path(scratch))
        if usage.status or not answer.is_file():
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise MachineError(
                row.name, f"{row.peer} to quantize", lines[-1] if lines else f"status {usage.status}", f"see {log}"
            )
        artifact = _artifact(made / "artifact")
        if (found := _rounds_activations(artifact)) != bool(row.activations):
            got = "a config.json with activations in few bits" if found else "one without"
            raise MachineError(row.name, row.told(iters), got, "ask the tool otherwise")
        facts = {
            "asked": row.told(iters), "command": " ".join(command[:3]) + " REQUEST.json", "request": asked, **usage.facts(),
            **json.loads(answer.read_text()), "packages": packages(python), "tensor_bytes": tensor_bytes(artifact),
        }  # fmt: skip
        if before := facts.get("before"):
            facts["seconds"] += before["seconds"]
            facts["cpu_seconds"] += before["cpu_seconds"]
            facts["stages"]["quantize"] += before["seconds"]
        if artifact != made / "artifact":
            os.rename(artifact, made / "found")
            shutil.rmtree(made / "artifact", ignore_errors=True)
            os.rename(made / "found", made / "artifact")
        (made / "made.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        shutil.rmtree(place, ignore_errors=True)
        os.rename(made, place)
    shutil.rmtree(blocks, ignore_errors=True)
    return place / "artifact", facts


def _rounds_activations(artifact: Path) -> bool:
    groups = json.loads((artifact / "config.json").read_text()).get("quantization_config", {}).get("config_groups", {})
    return any(group.get("input_activations") for group in groups.values())


def _artifact(folder: Path) -> Path:
    """Where the checkpoint is: some tools make a folder of their own in the one that they are given."""
    return next((file.parent for file in sorted(folder.rglob("config.json"))), folder)
