"""Peer process: quantizes a model with another tool, in that tool's environment.

python peer_process.py REQUEST.json: the request names the peer, the model, the token ids (safetensors), bits, group and where
to save; `answer` gets the seconds of each stage, those of the whole process among them, and versions. Knows nothing of ours.
AutoRound's blocks are kept as they are made, for all of them take hours: a process that is ended costs one of them.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

BEGUN = time.perf_counter()


class Stages:
    """Seconds by stage, each from the end of the one before."""

    def __init__(self) -> None:
        self.last, self.seconds = BEGUN, {}
        self.before: dict[str, float] = {}
        """What processes before this one took for blocks that are kept: how many, seconds, CPU seconds."""

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = round(now - self.last, 2), now


def llm_compressor(request: dict[str, Any], ids: list[list[int]], stages: Stages) -> str:
    """A modifier by `oneshot`, its defaults: GPTQ symmetric, damping 0.01, block 128, static activation order; or a pruner."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stages.end("imports")
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    stages.end("load")
    modifier: Any
    if method := request.get("method"):
        kept, _, of = request["sparsity"].partition(":")
        # Half is what 2:4 comes to; a structure of 0:0 is none.
        share, structure = (1 - int(kept) / int(of), request["sparsity"]) if of else (float(kept), "0:0")
        kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
        # It prunes what it targets whatever is ignored; the head stays as it is here too.
        modifier = kind(sparsity=share, mask_structure=structure, targets=[r"re:.*layers\..*_proj$"])
    elif form := request.get("form"):
        modifier = GPTQModifier(targets=["Linear"], scheme=f"{form.upper()}A16", ignore=["lm_head"])
    else:
        weights = {
            "num_bits": request["bits"], "type": "int", "symmetric": True, "strategy": "group", "group_size": request["group"],
        }  # fmt: skip
        group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
        if bits := request.get("activations"):
            group["input_activations"] = {
                "num_bits": bits, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
            }  # fmt: skip
        modifier = GPTQModifier(config_groups={"group_0": group}, ignore=["lm_head"])
    oneshot(
        model=model, tokenizer=tokenizer, dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": ones(ids)}),
        recipe=modifier, max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids), shuffle_calibration_samples=False,
    )  # fmt: skip
    stages.end("quantize")
    # What it has pruned stays dense.
    model.save_pretrained(request["out"], save_compressed=not request.get("method"))
    tokenizer.save_pretrained(request["out"])
    stages.end("save")
    return "llmcompressor"


def gptqmodel(request: dict[str, Any], ids: list[list[int]], stages: Stages) -> str:
    """GPTQModel, its defaults: symmetric, activation order within groups (act_group_aware)."""
    # On two cores it would have one worker, and then asks for two.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 1) // 2)))
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    stages.end("imports")
    config = QuantizeConfig(bits=request["bits"], group_size=request["group"])
    model = GPTQModel.load(request["model"], config, device="cpu", backend=BACKEND.TORCH)
    stages.end("load")
    rows = [{"input_ids": row, "attention_mask": mask} for row, mask in zip(ids, ones(ids), strict=True)]
    model.quantize(rows, batch_size=1, backend=BACKEND.TORCH)
    stages.end("quantize")
    model.save(request["out"])
    stages.end("save")
    return "gptqmodel"


def auto_round(request: dict[str, Any], ids: list[list[int]], stages: Stages) -> str:
    """AutoRound, its defaults but for the iterations that are asked for: symmetric, batches of 8."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stages.end("imports")
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    stages.end("load")
    batches = [
        {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
        for rows in torch.tensor(ids).split(8)
    ]  # fmt: skip
    form = request.get("form")
    # Of weights alone, as ours are.
    asked = (
        {"scheme": form.upper(), "act_bits": 16, "act_data_type": "float"}
        if form
        else {"scheme": "W4A16", "bits": request["bits"], "group_size": request["group"], "sym": True}
    )
    tuner = AutoRound(
        model, tokenizer, **asked, iters=request["iters"],
        nsamples=len(ids), seqlen=len(ids[0]), batch_size=8, dataset=batches, device_map="cpu",
    )  # fmt: skip
    stages.before = keep_blocks(Path(request["blocks"]))
    tuner.quantize()
    stages.end("quantize")
    tuner.save_quantized(request["out"], format="llm_compressor" if form else "auto_gptq")
    if form:
        name_weights_alone(Path(request["out"]))
    tokenizer.save_pretrained(request["out"])
    stages.end("save")
    return "auto-round"


def name_weights_alone(folder: Path) -> None:
    """Takes activations out of config.json: AutoRound writes its preset, which rounds them, also where they were left as they are."""
    for file in folder.rglob("config.json"):
        config = json.loads(file.read_text())
        for group in config["quantization_config"]["config_groups"].values():
            group["input_activations"] = None
        file.write_text(json.dumps(config, indent=2) + "\n")


def keep_blocks(folder: Path) -> dict[str, float]:
    """AutoRound's blocks are kept in `folder` from now on; those that lie there are taken instead of being tuned.

    A block comes with the streams that leave it and the states of all generators, so the blocks after it become what they would
    have become. These files are the benchmark's own; nothing that was downloaded is unpickled.
    """
    import numpy
    import torch
    from auto_round.algorithms.composer import AlgorithmComposer

    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state.pt"
    kept = torch.load(state, weights_only=False) if state.is_file() else {"blocks": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    before = {name: kept[name] for name in ("blocks", "seconds", "cpu_seconds")}
    tune = AlgorithmComposer.compress_block

    def replace(file: Path, value: Any) -> None:
        torch.save(value, file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)

    def kept_or_tuned(self: Any, block: Any, inputs: Any, others: Any, block_ctx: Any, **more: Any) -> tuple[Any, Any]:
        file = folder / f"{block_ctx.block_index}.pt"
        if block_ctx.block_index < before["blocks"]:
            block.__dict__.update(torch.load(file, weights_only=False).__dict__)
            if block_ctx.block_index + 1 < before["blocks"]:
                return more.get("q_inputs"), inputs
            random.setstate(kept["random"])
            numpy.random.set_state(kept["numpy"])
            torch.set_rng_state(kept["torch"])
            return kept.pop("streams")
        begun, used = time.perf_counter(), time.process_time()
        streams = tune(self, block, inputs, others, block_ctx=block_ctx, **more)
        kept["seconds"] += time.perf_counter() - begun
        kept["cpu_seconds"] += time.process_time() - used
        generators = {"random": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
        replace(file, block)
        replace(state, {**kept, **generators, "blocks": block_ctx.block_index + 1, "streams": streams})
        return streams

    AlgorithmComposer.compress_block = kept_or_tuned
    return before


def ones(ids: list[list[int]]) -> list[list[int]]:
    """The mask of samples without padding."""
    return [[1] * len(row) for row in ids]


def main(request: dict[str, Any]) -> None:
    from safetensors import safe_open

    with safe_open(request["ids"], "pt") as file:
        ids = file.get_tensor("input_ids").tolist()
    stages = Stages()
    peer = {"llm-compressor": llm_compressor, "gptqmodel": gptqmodel, "auto-round": auto_round}[request["peer"]]
    package = peer(request, ids, stages)
    answer = {
        "stages": stages.seconds, "whole_seconds": round(time.perf_counter() - BEGUN, 2), "before": stages.before,
        "versions": {name: metadata.version(name) for name in (package, "torch", "transformers")},
    }  # fmt: skip
    Path(request["answer"]).write_text(json.dumps(answer))
    print(json.dumps(answer))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
