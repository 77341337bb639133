"""Numbers that no option can mean, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from bad_input.bench import RTN, Case

GPTQ = "quantize gptq {model} {out} --scheme w4a16g32 "
RATE = "distill logits {model} {out} --data {work}/data.jsonl "
HIDDEN = "distill squarehead {model} {out} --data {work}/data.jsonl "
CALIBRATE = "calibrate {model} {out} --data {work}/data.jsonl "
EVAL = "eval {model} --data {work}/data.jsonl "


def texts(model: Path) -> None:
    (model.parent / "data.jsonl").write_text("".join(json.dumps({"text": f"text {i} of many"}) + "\n" for i in range(99)))


def _case(argv: str, *said: str, status: int = 2) -> Case:
    return Case(status, said, argv, texts, "demo")


CASES = {
    "damping NaN": _case(GPTQ + "--damping nan", "quantize.gptq.damping", "a finite number", "nan", "added to the Hessian's diagonal"),
    "damping inf": _case(GPTQ + "--damping inf", "quantize.gptq.damping", "a finite number"),
    "damping 0": _case(GPTQ + "--damping 0", "quantize.gptq.damping", "greater than 0", "0.0"),
    "damping 2": _case(GPTQ + "--damping 2", "quantize.gptq.damping", "less than or equal to 1", "2.0"),
    "damping of text": _case(GPTQ + "--damping much", "Invalid value for '--damping'"),
    "sweeps -1": _case(GPTQ + "--sweeps -1", "quantize.gptq.sweeps", "greater than or equal to 0", "-1"),
    "sweeps 1.5": _case(GPTQ + "--sweeps 1.5", "Invalid value for '--sweeps'"),
    "sweeps 10^9": _case(GPTQ + "--sweeps 1000000000", "quantize.gptq.sweeps", "less than or equal to 100"),
    "group 0": _case("quantize rtn {model} {out} --scheme w4a16g0", "quantize.rtn.scheme", "a group of at least 8 columns"),
    "0 bits": _case("quantize rtn {model} {out} --scheme w0a16", "quantize.rtn.scheme", "bits among 2, 3, 4, 5, 6, 8"),
    "a group of 10^30": _case("quantize rtn {model} {out} --scheme w4a16g" + "9" * 30, "a scheme such as w4a16g128"),
    "least_zero 2": _case("quantize rtn {model} {out} --scheme w4a16 --least-zero 2", "least_zero", "less than or equal to 1"),
    "sparsity NaN": _case("prune magnitude {model} {out} --sparsity nan", "prune.magnitude.sparsity", "a share of zeros between 0 and 1"),
    "sparsity 1": _case("prune magnitude {model} {out} --sparsity 1", "a share of zeros between 0 and 1"),
    "sparsity 0": _case("prune magnitude {model} {out} --sparsity 0", "a share of zeros between 0 and 1"),
    "sparsity -0.5": _case("prune magnitude {model} {out} --sparsity=-0.5", "a share of zeros between 0 and 1"),
    "sparsity 4:2": _case("prune magnitude {model} {out} --sparsity 4:2", "kept:of such as 2:4"),
    "sparsity 0:4": _case("prune magnitude {model} {out} --sparsity 0:4", "kept:of such as 2:4"),
    "sparsity 1:10^5000": _case("prune magnitude {model} {out} --sparsity 1:" + "9" * 5000, "kept:of such as 2:4"),
    "sparsity that leaves less than a weight per output": _case("prune magnitude {model} {out} --sparsity 0.999", "0.999 of zeros leaves", "outputs, so some would be empty", "keep more, or skip it", status=4),
    "sparsity 3:7": _case("prune magnitude {model} {out} --sparsity 3:7", "7 does not divide", "use a share of zeros", status=4),
    "sparsegpt of everything": _case("run {model} {out} -p 'calibrate | prune.sparsegpt(sparsity=1.0)'", "prune.sparsegpt.sparsity", "a share of zeros between 0 and 1"),
    "owl with n:m": _case("run {model} {out} -p 'calibrate | prune.wanda(sparsity=2:4, owl=true)'", "with a share of zeros such as 0.7", "2:4 is the same in every block"),
    "owl without owl": _case("run {model} {out} -p 'calibrate | prune.wanda(sparsity=0.5, owl_m=3)'", "owl_m: only with owl=true"),
    "owl that would empty a block": _case("run {model} {out} -p 'calibrate | prune.sparsegpt(sparsity=0.9, owl=true)'", "owl_lambda: below 0.05", "a block might keep nothing"),
    "owl without tokens": _case("prune magnitude {model} {out} --sparsity 0.5 --owl", "calibration tokens", "compress run MODEL OUT -p 'calibrate | prune.magnitude", status=2),
    "gptq with zeros and outliers": _case("run {model} {out} -p 'calibrate | quantize.gptq(scheme=w4a16g32, sparsity=2:4, outliers=0.01)'", "outliers: not with sparsity"),
    "rotate nothing": _case("quantize rotate {model} {out} --no-r1 --no-r2", "quantize.rotate", "at least one of them"),
    "a rotation of an unknown kind": _case("quantize rotate {model} {out} --kind givens", "quantize.rotate.kind", "'hadamard', 'block' or 'orthogonal'"),
    "rotate codes": _case(
        "run {model} {out} -p 'quantize.rtn(scheme=w4a16g32) | quantize.rotate(untie=true)'", "codes cannot be rotated",
        "rotate before quantizing", status=4,
    ),
    "quik with activations in 16 bits": _case("run {model} {out} -p 'calibrate | quantize.quik(scheme=w4a16g32)'", "scheme: symmetric integers with integer activations such as w4a4-aasym"),
    "quik that keeps every input": _case("run {model} {out} -p 'calibrate | quantize.quik(outliers=4096)'", "4096 kept columns leave none of", "lower outliers, or skip it", status=4),
    "quik for another reader": _case("run {model} {out} -p 'calibrate | quantize.quik | pack'", "no reader of compressed-tensors takes columns(", "pack as native", status=5),
    "activations of 2 bits": _case("quantize rtn {model} {out} --scheme w4a2", "a16, a8 or a4 (activations in 16, 8 or 4 bits)", "a2"),
    "no layer": _case("run {model} {out} -p 'calibrate | prune.depth(layers=0)'", "prune.depth.layers", "greater than or equal to 1"),
    "all layers": _case("run {model} {out} -p 'calibrate | prune.depth(layers=4)'", "layers=4, and the model has 4", "keep fewer", status=4),
    "more heads than there are": _case("prune slice {model} {out} --heads 16", "16 query heads for 4 key-value heads", "choose as many", status=4),
    "more neurons than there are": _case("prune slice {model} {out} --ffn 385", "units of 385, and the model has 384", status=4),
    "a target above the source": _case("run {model} {out} -p 'calibrate | prune.sheared(parameters=1B)'", "choose a smaller target", status=4),
    "a target below everything": _case("run {model} {out} -p 'calibrate | prune.width(size=1kB)'", "choose a larger target", status=4),
    "a target that is no number": _case("run {model} {out} -p 'calibrate | prune.width(parameters=some)'", "a number such as 100M"),
    "two targets": _case("run {model} {out} -p 'calibrate | prune.sheared(layers=2, parameters=1M)'", "give sizes such as layers"),
    "experts of a model without": _case("run {model} {out} -p 'calibrate | prune.experts(experts=2)'", "no routed experts", "use prune.width", status=4),
    "samples 0": _case(CALIBRATE + "--samples 0", "samples", "at least 1", "0"),
    "samples -1": _case(CALIBRATE + "--samples -1", "samples", "at least 1", "-1"),
    "samples NaN": _case(CALIBRATE + "--samples nan", "Invalid value for '--samples'"),
    "length 1": _case(CALIBRATE + "--length 1", "length", "at least 2", "1"),
    "length 10^30": _case(CALIBRATE + "--length 1" + "0" * 30, "length", "at most 512, the positions of the model"),
    "weights NaN": _case(CALIBRATE + "--weights nan", "weights", "finite number"),
    "weights 0": _case(CALIBRATE + "--weights 0", "weights", "finite numbers above 0", "0.0"),
    "weights inf": _case(CALIBRATE + "--weights inf", "weights", "finite number"),
    "two weights for one source": _case(CALIBRATE + "--weights 1 --weights 2", "one for each source of data", "2 for 1 sources"),
    "lr NaN": _case(RATE + "--lr nan", "distill.logits.lr", "a finite number"),
    "lr -1": _case(RATE + "--lr -1", "distill.logits.lr", "greater than or equal to 0"),
    "lr 10^40": _case(RATE + "--lr 1e40", "distill.logits.lr", "less than or equal to 1000000000000000000000000000000"),
    "temperature 0": _case(RATE + "--temperature 0", "distill.logits.temperature", "greater than 0"),
    "temperature inf": _case(RATE + "--temperature inf", "distill.logits.temperature", "a finite number"),
    "warmup 1": _case(RATE + "--warmup 1", "distill.logits.warmup", "less than 1"),
    "betas NaN": _case(RATE + "--betas nan --betas 0.9", "distill.logits.betas", "a finite number"),
    "loading of one source": _case(RATE + "--loading dynamic", "two sources of data or more"),
    "options that no static loading reads": _case(RATE + "--held-out 9 --pool 3", "held_out, pool: only with loading=dynamic"),
    "held_out 0": _case(RATE + "--held-out 0", "distill.logits.held_out", "greater than or equal to 1"),
    "one beta": _case(RATE + "--betas 0.9", "distill.logits.betas", "one more value", "('0.9',)", "AdamW's two"),
    "batch 0": _case(RATE + "--batch 0", "distill.logits.batch", "greater than or equal to 1"),
    "weight_decay -1": _case(RATE + "--weight-decay -1", "distill.logits.weight_decay", "greater than or equal to 0"),
    "eps of text": _case(HIDDEN + "--eps small", "distill.squarehead.eps", "parity, paper or a number above 0", "'small'"),
    "eps 0": _case(HIDDEN + "--eps 0", "distill.squarehead.eps", "parity, paper or a number above 0"),
    "eps NaN": _case(HIDDEN + "--eps nan", "distill.squarehead.eps", "parity, paper or a number above 0"),
    "squarehead 0": _case(HIDDEN + "--squarehead 0", "distill.squarehead.squarehead", "greater than 0"),
    "a layer that is not there": _case(HIDDEN + "--layers 99", "distill.squarehead.layers", "layers from 0 to", "99", status=3),
    "shard-size 0": _case(RTN + " --shard-size 0", "--shard-size", "a size such as 500MB or 5GB", "'0'"),
    "shard-size -1GB": _case(RTN + " --shard-size=-1GB", "--shard-size", "a size such as", "'-1GB'"),
    "shard-size nan": _case(RTN + " --shard-size nan", "--shard-size", "a size such as", "'nan'"),
    "shard-size 1e9": _case(RTN + " --shard-size 1e9", "--shard-size", "a size such as", "'1e9'"),
    "seed -1": _case(RTN + " --seed -1", "Invalid value for '--seed'"),
    "seed NaN": _case(RTN + " --seed nan", "Invalid value for '--seed'"),
    "dtype int8": _case(CALIBRATE + "--length 16 --samples 2 --dtype int8", "dtype", "auto, float32 or bfloat16", "'int8'"),
    "fail-on NaN": _case(RTN + " --fail-on 'error>nan'", "--fail-on"),
    "eval length 0": _case(EVAL + "--length 0", "Invalid value for '--length'"),
    "eval length 10^12": _case(EVAL + "--length 1000000000000", "at least 1,000,000,000,000 tokens", "give a longer text, or lower length", status=3),
    "eval tokens -1": _case(EVAL + "--tokens -1", "Invalid value for '--tokens'"),
    "eval tokens below a window": _case(EVAL + "--tokens 16 --length 64", "tokens", "at least a window of 64", "16"),
    "eval batch 0": _case(EVAL + "--batch 0", "Invalid value for '--batch'"),
    "generate new tokens 0": _case("generate {model} --prompt a --new-tokens 0", "Invalid value for '--new-tokens'"),
    "generate temperature NaN": _case("generate {model} --prompt a --temperature nan", "temperature"),
    "generate temperature inf": _case("generate {model} --prompt a --temperature inf", "temperature", "a number from 0", "inf", "0 takes the likeliest token"),
    "generate seed 10^30": _case("generate {model} --prompt a --temperature 1 --seed 1" + "0" * 30, "Invalid value for '--seed'"),
    "allow-skips of no expression": _case(RTN + " --allow-skips '('", "--allow-skips '('", "a regular expression"),
    "a target of no expression": _case("quantize rtn {model} {out} --scheme w4a16g32 --targets 're:a{99999999999}'", "quantize.rtn.targets", "repetition number is too large"),
}  # fmt: skip
