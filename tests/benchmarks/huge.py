"""Benchmark: `compress plan` of every installed recipe on checkpoints of DeepSeek-V3 and Kimi-K2 in bf16, by their headers.

    python tests/benchmarks/huge.py [--models deepseek-v3,kimi-k2] [--recipes rtn_w4,gptq_w4] [--fp8]

Names, shapes, number of shards and config.json are those of the released models (671 billion and 1 trillion parameters; Kimi-K2
under the model_type that its authors name for programs without its own). The files are sparse: headers are real, data are holes,
so that they take no disk. Each plan is a process of its own; the status is 1 if one takes over 10 s of the CPU or 1 GB.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
_KIMI = {
    **_DEEPSEEK, "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1, "max_position_embeddings": 131072,
    "n_group": 1, "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0,
    "rope_theta": 50000.0, "rope_scaling": {**_DEEPSEEK["rope_scaling"], "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "routed_scaling_factor": 2.827, "topk_group": 1, "vocab_size": 163840,
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], int]] = {"deepseek-v3": (_DEEPSEEK, 163), "kimi-k2": (_KIMI, 61)}
"""config.json and the number of shards, by name."""

_LINEAR = re.compile(r"layers\..*(?<!eh)_proj(_with_mqa)?\.weight$")
"""The tensors that are released in FP8."""
Shapes = dict[str, tuple[int, ...]]


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of a DeepSeek-V3, with the blocks that predict further tokens after the others."""
    hidden, heads, latent, rope = (
        config[key] for key in ("hidden_size", "num_attention_heads", "kv_lora_rank", "qk_rope_head_dim")
    )
    rank, inner, values = config["q_lora_rank"], config["qk_nope_head_dim"], config["v_head_dim"]
    layers, experts, vocabulary = config["num_hidden_layers"], config["n_routed_experts"], config["vocab_size"]
    attention: Shapes = {
        "q_a_proj.weight": (rank, hidden), "q_a_layernorm.weight": (rank,), "q_b_proj.weight": (heads * (inner + rope), rank),
        "kv_a_proj_with_mqa.weight": (latent + rope, hidden), "kv_a_layernorm.weight": (latent,),
        "kv_b_proj.weight": (heads * (inner + values), latent), "o_proj.weight": (hidden, heads * values),
    }  # fmt: skip

    def gated(path: str, width: int) -> Shapes:
        inwards = {f"{path}.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
        return {**inwards, f"{path}.down_proj.weight": (hidden, width)}

    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers + config["num_nextn_predict_layers"]):
        block: Shapes = {f"self_attn.{name}": shape for name, shape in attention.items()}
        if layer < config["first_k_dense_replace"]:
            block |= gated("mlp", config["intermediate_size"])
        else:
            block |= {"mlp.gate.weight": (experts, hidden), "mlp.gate.e_score_correction_bias": (experts,)}
            block |= gated("mlp.shared_experts", config["n_shared_experts"] * config["moe_intermediate_size"])
            for expert in range(experts):
                block |= gated(f"mlp.experts.{expert}", config["moe_intermediate_size"])
        block |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        if layer >= layers:
            block |= {"embed_tokens.weight": (vocabulary, hidden), "enorm.weight": (hidden,), "hnorm.weight": (hidden,)}
            block |= {"eh_proj.weight": (hidden, 2 * hidden), "shared_head.norm.weight": (hidden,)}
            block |= {"shared_head.head.weight": (vocabulary, hidden)}
        yield from ((f"model.layers.{layer}.{name}", shape) for name, shape in block.items())
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def sparse(folder: Path, config: dict[str, Any], shapes: Shapes, shards: int, fp8: bool = False) -> int:
    """A checkpoint in bf16 whose data are holes, in so many shards of about the same size; returns the bytes that it seems to have.

    What corrects the scores of a router is in float32, as released. With `fp8` the linears of blocks are in FP8 with a scale for
    each block of 128 by 128, as DeepSeek-V3 and Kimi-K2 are released.
    """
    folder.mkdir(parents=True)
    packed = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": packed} if fp8 else config))
    stored: dict[str, tuple[str, int, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if fp8 and _LINEAR.search(name):
            stored[name] = ("F8_E4M3", math.prod(shape), shape)
            grid = tuple(-(-size // 128) for size in shape)
            stored[f"{name}_scale_inv"] = ("F32", 4 * math.prod(grid), grid)
        else:
            dtype, size = ("F32", 4) if name.endswith("e_score_correction_bias") else ("BF16", 2)
            stored[name] = (dtype, size * math.prod(shape), shape)
    total, before = sum(nbytes for _, nbytes, _ in stored.values()), 0
    parts: list[list[str]] = [[] for _ in range(shards)]
    for name, (_, nbytes, _) in stored.items():
        parts[before * shards // total].append(name)
        before += nbytes
    places = {}
    for number, names in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{shards:06d}.safetensors"
        header, at = {}, 0
        for name in names:
            dtype, nbytes, shape = stored[name]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
            at += nbytes
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + at)
        places.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def plan(model: Path, *recipe: str) -> tuple[float, float, int, str]:
    """(wall seconds, CPU seconds, peak resident bytes, last line or first line of the refusal) of `compress plan` in its own process."""
    with tempfile.TemporaryFile("w+") as said:
        started = time.perf_counter()
        command = [sys.executable, "-P", "-m", "compress", "plan", str(model), *recipe]
        child = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        # Not Popen.wait: only wait4 tells what this one child has used.
        _, status, used = os.wait4(child.pid, 0)
        child.returncode, seconds = os.waitstatus_to_exitcode(status), time.perf_counter() - started
        said.seek(0)
        lines = [line.strip() for line in said if line.strip()]
    ending = (
        next((line for line in lines if line.startswith("memory")), "planned") if not child.returncode else " ".join(lines[:4])
    )
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, f"[{child.returncode}] {ending}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--recipes", help="names of installed recipes; all of them without")
    parser.add_argument("--fp8", action="store_true", help="as released, in FP8, which is unpacked first")
    parser.add_argument("--seconds", type=float, default=10, help="what a plan may take")
    parser.add_argument("--gigabytes", type=float, default=1, help="what it may hold")
    args = parser.parse_args()
    installed = sorted(file.stem for file in (Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    recipes = [(name, [name]) for name in (args.recipes.split(",") if args.recipes else installed)]
    if args.fp8:
        recipes = [("unpack, rtn, pack", ["-p", "unpack(to=dense) | quantize.rtn(scheme=w4a16g64) | pack"])]
    over = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models.split(","):
            config, shards = MODELS[name]
            model, shapes = Path(scratch) / name, dict(tensors(config))
            total = sparse(model, config, shapes, shards, args.fp8)
            taken = sum(file.stat().st_blocks * 512 for file in model.iterdir())
            count = sum(map(math.prod, shapes.values()))
            print(f"{name}: {count / 1e9:.1f} billion parameters, {shards} shards, {total / 1e12:.2f} TB of which the disk holds "
                  f"{taken / 1e6:.0f} MB", flush=True)  # fmt: skip
            for label, words in recipes:
                seconds, used, peak, said = plan(model, *words)
                wrong = used > args.seconds or peak > args.gigabytes * 1e9
                over += wrong
                print(f"  {label:17} {seconds:6.1f} s wall  {used:6.1f} s CPU  {peak / 1e9:.2f} GB  "
                      f"{'OVER  ' if wrong else ''}{said[:110]}", flush=True)  # fmt: skip
    sys.exit(1 if over else 0)


if __name__ == "__main__":
    main()
