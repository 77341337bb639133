"""Step identity: the hash of everything that a step's bytes come from."""

from __future__ import annotations

from compress.checkpoint.manifest import hash_json
from compress.contract.pass_base import Pass


def step_id(parent: str, pass_: Pass, seed: int, inputs: dict[str, str]) -> str:
    """The id of a step; `parent` is the fingerprint of the checkpoint it reads, `inputs` identify what else it reads."""
    return hash_json({"parent": parent, "seed": seed, "inputs": inputs, **pass_.redacted().identity()})
