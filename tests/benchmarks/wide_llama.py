"""Wide Llama: a small trained Llama whose matrices divide by 256, as K-quants want them; made once, kept in the cache.

    python tests/benchmarks/wide_llama.py

It is tiny-llama-8m of the models beside a checkout (8 layers, hidden 256) with 768 neurons instead of 704 in each MLP: 64 are split
in two, which share what they wrote, with a little noise between them; then `train.lm` trains all of it on the four training texts,
409,600 tokens. Three minutes of one core. Prints the directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from benchmarks.real import ours
from benchmarks.real.model import publish
from benchmarks.real.table import digest, tell
from safetensors.torch import load_file, save_file

from compress.checkpoint.cache import folder_of
from compress.errors import MachineError

SHARED = Path(__file__).parents[3] / "shared"
START, NEURONS, NOISE, SEED = "tiny-llama-8m", 768, 0.05, 0
DOMAINS = ("wiki", "code", "speech", "plays")
TRAIN = "train.lm(data={texts}, samples=1600, length=256, batch=16, micro_batch=8, lr=1e-3)"
COMPRESS = str(Path(sys.executable).with_name("compress"))


def wide_llama(tell: Callable[[str], None]) -> Path:
    """The directory of the checkpoint. Raises CompressError without the models and texts beside the checkout."""
    start, texts = SHARED / "models" / START, [SHARED / "data" / f"{domain}.train.jsonl" for domain in DOMAINS]
    for path in (start, *texts):
        if not path.exists():
            do = "name a checkpoint of your own with --model"
            raise MachineError("the wide Llama", "the trained models and texts of ../shared", f"no {path}", do)
    key = f"{NEURONS} {NOISE} {SEED} {TRAIN} {digest(start / 'config.json', start / 'model.safetensors')} {digest(*texts)}"
    place = folder_of("kquants") / f"wide-llama-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if (place / "config.json").is_file():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    tell(f"training {START} with {NEURONS} neurons, some minutes; this is done once, in {place}")
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f"{place.name}.tmp-") as folder:
        begun, out = Path(folder) / "begun", Path(folder) / "out"
        widen(start, begun)
        recipe = TRAIN.format(texts="[" + ", ".join(f"'{path}'" for path in texts) + "]")
        ours.said(
            [COMPRESS, "run", str(begun), str(out), "-p", recipe, "--seed", str(SEED), "--json"],
            place.with_name(f"{place.name}.log"),
        )
        publish(out, place)
    return place


def widen(start: Path, out: Path, neurons: int = NEURONS) -> None:
    """Writes a checkpoint with more neurons that computes nearly the same."""
    shutil.copytree(start, out)
    config = json.loads((start / "config.json").read_text())
    os.chmod(out, 0o755)
    for file in out.iterdir():
        file.chmod(0o644)
    (out / "config.json").write_text(json.dumps({**config, "intermediate_size": neurons}, indent=2) + "\n")
    tensors, random = load_file(start / "model.safetensors"), torch.Generator().manual_seed(SEED)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp."
        chosen = torch.randperm(config["intermediate_size"], generator=random)[: neurons - config["intermediate_size"]]
        for name in ("gate_proj", "up_proj"):
            weight = tensors[f"{prefix}{name}.weight"].float()
            noise = NOISE * weight.std() * torch.randn(len(chosen), weight.shape[1], generator=random)
            tensors[f"{prefix}{name}.weight"] = torch.cat([weight, weight[chosen] + noise]).to(torch.bfloat16)
        down = tensors[f"{prefix}down_proj.weight"]
        down[:, chosen] *= 0.5
        tensors[f"{prefix}down_proj.weight"] = torch.cat([down, down[:, chosen]], dim=1)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    print(wide_llama(tell))
