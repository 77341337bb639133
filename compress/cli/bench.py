"""`compress bench`: tokens a second of a packed model, or its kernels."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli import console, options
from compress.cli.guard import guarded
from compress.errors import CompressError, Problem, UsageError
from compress.threads import compute_threads

if TYPE_CHECKING:
    from compress.checkpoint.reader import Checkpoint
    from compress.evaluate.bench import Memory, Settings, Speed, Subject

_CPU_SHAPES, _CPU_TOKENS, _CPU_SCHEMES = "4096x4096", "1,16,64", "w4a16g128,w4a16g128-asym,w3a16g128,nf4g64"
_GPU_TOKENS, _GPU_SCHEMES = "1,8,16,32,64,128,2048", "w4a16g128,w8a16g128,w3a16g128,w2a16g128,nf4g64,fp4g128,fp8"


def register(app: typer.Typer) -> None:
    app.command("bench")(command)


@guarded
def command(
    artifact: Annotated[
        str | None, typer.Argument(help="An artifact of pack(format=native); none with --kernels.", show_default=False)
    ] = None,
    against: Annotated[str | None, typer.Option(metavar="SOURCE", help="The dense model, timed in the same rounds.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 512,
    new_tokens: options.NewTokens = 64,
    new: Annotated[int | None, typer.Option("--new", help="The old name of --new-tokens.", min=1, hidden=True)] = None,
    batch: Annotated[str, typer.Option(metavar="N,...", help="How many prompts at a time.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(help="How often each model or product is timed.", min=1)] = 3,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Text to take prompts from; random tokens without it.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random tokens.", min=0)] = 0,
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Also time llama.cpp on SOURCE in as many bits, one prompt, in an environment of its own."),
    ] = False,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Also time decoding by compiled code, on the CPU; compiling takes a minute or more.")
    ] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="Time products by single weights instead of a model.")] = False,
    schemes: Annotated[
        str | None, typer.Option(metavar="SCHEME,...", help="With --kernels: schemes, or states such as codes(...)+masked(2:4).")
    ] = None,
    shapes: Annotated[
        str | None, typer.Option(metavar="NxK,...", help="With --kernels: rows and columns; seven layers of Llamas on a GPU.")
    ] = None,
    activations: Annotated[
        str | None, typer.Option(metavar="N,...", help="With --kernels: how many rows of activations, a token each.")
    ] = None,
    backend: options.Backend = None,
    device: options.Device = "auto",
    dtype: options.ComputeDtype = "auto",
    repack: options.Repack = False,
    threads: options.Threads = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: options.Debug = False,
) -> None:
    """Time a packed model: prompts and greedy decoding, in tokens a second. Its logits are checked first.

    With --kernels: products by packed weights of usual shapes, each checked against fp32, next to dense and third-party kernels.
    """
    options.one_of("--dtype", dtype, options.DTYPES)
    options.one_of("--device", device, options.DEVICES)
    wrong = (
        {
            "ARTIFACT": artifact,
            "--against": against,
            "--repack": "given" if repack else None,
            "--peers": "given" if peers else None,
            "--compile": "given" if compile_ else None,
        }
        if kernels
        else {"--schemes": schemes, "--shapes": shapes, "--activations": activations}
    )
    if given := [name for name, value in wrong.items() if value is not None]:
        expected = "none beside --kernels" if kernels else "--kernels beside it"
        raise UsageError(given[0], expected, f"'{wrong[given[0]]}'", "leave it out" if kernels else "add --kernels")
    if not kernels and artifact is None:
        raise UsageError("ARTIFACT", "an artifact, or --kernels", "neither", "name the OUT of pack(format=native)")
    from compress.evaluate.backend_report import default_device

    where = default_device() if device == "auto" else device
    if kernels:
        with compute_threads(threads):
            time_kernels(schemes, shapes, activations, backend, where, dtype, json_)
        return
    if peers and (against is None or where == "cuda"):
        got = "no --against" if against is None else f"--device {where}"
        raise UsageError("--peers", "the dense model, from which llama.cpp's file is made, and the CPU", got)
    if compile_ and where == "cuda":
        raise UsageError("--compile", "the CPU", f"--device {where}, where a step is a CUDA graph", "leave it out")
    from compress.evaluate.bench import Settings

    assert artifact is not None
    counts = numbers("--batch", batch)
    settings = Settings(prompt, new or new_tokens, counts, rounds, where, dtype, backend, seed, repack, compile_)
    with compute_threads(threads):
        time_model(artifact, against, data, settings, json_, peers)


def numbers(option: str, text: str, between: str = ",") -> tuple[int, ...]:
    """The whole numbers above zero in a text. Raises UsageError."""
    parts = text.split(between)
    if not all(part.strip().isdecimal() and 0 < int(part) < 1 << 31 for part in parts):
        raise UsageError(option, f"whole numbers above 0 with '{between}' between them", f"'{text}'")
    return tuple(map(int, parts))


def time_model(artifact: str, against: str | None, data: str | None, settings: Settings, as_json: bool, peers: bool) -> None:
    """Checks the models, times them and prints the speeds."""
    from transformers.utils import logging

    from compress.checkpoint.source import open_source
    from compress.evaluate import bench
    from compress.evaluate.backend_report import runs_on

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    checkpoints = [open_source(name) for name in (artifact, against) if name is not None]
    bench.check_settings(checkpoints, settings)
    ids = bench.prompts(checkpoints, settings, data)
    subjects = [bench.load_packed(checkpoints[0], settings)]
    difference = bench.check(checkpoints[0], subjects[0], ids)
    dtype = subjects[0].model.dtype
    subjects += [bench.load_dense(checkpoint, settings, dtype) for checkpoint in checkpoints[1:]]
    speeds = bench.timed(subjects, ids, settings)
    if peers:
        from compress.evaluate import llama_cpp_speed

        scheme = llama_cpp_speed.scheme_for(subjects[0].model)
        speeds += llama_cpp_speed.speeds(checkpoints[1], scheme, settings, partial(print, file=sys.stderr))
    drawn = data or f"random, seed {settings.seed}"
    protocol = (
        f"prompts of {settings.prompt} tokens ({drawn}) in one forward, then {settings.new} tokens, greedy, with a cache of keys "
        f"and values; {settings.rounds} rounds, all models in each"
    )
    name = bench.dtype_name(subjects[0].model)
    allowed = subjects[0].allowed
    if as_json:
        print(json.dumps({
            "model": checkpoints[0].name, "against": against, "device": runs_on(settings.device), "dtype": name,
            "protocol": protocol, "difference": difference, "allowed": allowed,
            "memory": {s.label: vars(s.memory) for s in subjects}, "backends": subjects[0].backends,
            "speeds": [{**vars(speed), "best": speed.best, "median": speed.median} for speed in speeds],
        }, ensure_ascii=False))  # fmt: skip
        return
    show_speeds(speeds)
    show_memory(subjects)
    show_compiled(speeds)
    console.fact("model", label(checkpoints[0]))
    if against:
        console.fact("against", label(checkpoints[1]))
    console.fact("backends", ", ".join(f"{count} weights {backend}" for backend, count in subjects[0].backends.items()))
    console.fact("device", f"{runs_on(settings.device)}, {name}")
    why = ", as activations are rounded to 8 bits" if subjects[0].rounds else ""
    off = f"logits are within {difference:.2g} of what the codes mean in fp32"
    console.fact("checked", f"{off} (relative; {allowed:.2g} is allowed{why})")
    console.fact("protocol", protocol)


def label(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.name} ({checkpoint.config.get('model_type')}), {console.size(checkpoint.nbytes)} of tensors"


def show_speeds(speeds: list[Speed]) -> None:
    """Prints tokens a second; ratios are of medians, above 1 where the packed model is faster."""
    from compress.evaluate.bench import COMPILED, DENSE, PACKED

    found = {(speed.batch, speed.phase, speed.label): speed for speed in speeds}
    # In the order in which they were timed; a column for each that stands beside the packed model.
    others = list(dict.fromkeys(speed.label for speed in speeds if speed.label not in (PACKED, COMPILED)))
    rows = []
    for batch, phase in dict.fromkeys((speed.batch, speed.phase) for speed in speeds):
        for own, name in ((PACKED, phase), (COMPILED, f"{phase}, compiled")):
            if (packed := found.get((batch, phase, own))) is None:
                continue
            cells = []
            for label in others:
                other = found.get((batch, phase, label))
                cells += [_rate(other), f"{packed.median / other.median:.2f}x" if other else "-"]
            rows.append((batch, name, _rate(packed), *cells, packed.how))
    heads = [word for label in others for word in (label, "ratio")]
    told = (
        "tokens a second, the median of all rounds and the best one"
        + "; ratio: of medians, packed by the one beside it" * bool(others)
    )
    console.table(("batch", "phase", "packed", *heads, "how"), rows, told)
    for label, how in dict.fromkeys((speed.label, speed.how) for speed in speeds if speed.label not in (PACKED, COMPILED, DENSE)):
        console.text(f"{label}: {how}; only the last token's logits of a prompt, as here")


def show_compiled(speeds: list[Speed]) -> None:
    """Prints what compiling took, and what it brings."""
    from compress.evaluate.bench import COMPILED, DECODE, PACKED

    eager = {speed.batch: speed for speed in speeds if (speed.label, speed.phase) == (PACKED, DECODE)}
    for speed in (speed for speed in speeds if speed.label == COMPILED):
        brings = f"a token is {speed.median / eager[speed.batch].median:.2f}x as fast as without"
        prompts = "1 prompt" if speed.batch == 1 else f"{speed.batch} prompts"
        console.fact("compiled", f"in {speed.compile_seconds:.1f} s for {prompts}; {brings}")


def _rate(speed: Speed | None) -> str:
    return f"{speed.median:,.1f} ({speed.best:,.1f})" if speed else "-"


def show_memory(subjects: list[Subject]) -> None:
    """Prints the memory that each model takes."""

    def cells(memory: Memory) -> list[str]:
        held = [memory.tensor_bytes, memory.resident_bytes, memory.peak_bytes, memory.gpu_bytes, memory.gpu_peak_bytes]
        return ["-" if nbytes is None else console.size(nbytes) for nbytes in held]

    head = ("memory after load", "tensors", "resident", "peak", "GPU", "GPU peak")
    console.table(head, [(subject.label, *cells(subject.memory)) for subject in subjects])


def time_kernels(
    schemes: str | None, shapes: str | None, activations: str | None, backend: str | None, device: str, dtype: str, as_json: bool
) -> None:  # fmt: skip
    """Times kernels and prints the results; ends with status 1 if a backend's product is wrong."""
    import torch

    from compress.checkpoint.reader import torch_dtype
    from compress.evaluate.backend_report import DTYPES, check_device, runs_on
    from compress.kernels import bench

    check_device(device)
    gpu = device == "cuda"
    if shapes is None and gpu:
        sizes: list[tuple[int, ...]] = [*bench.LAYERS]
    else:
        sizes = [numbers("--shapes", shape, "x") for shape in (shapes or _CPU_SHAPES).split(",")]
    if any(len(shape) != 2 for shape in sizes):
        raise UsageError("--shapes", "rows x columns, such as 4096x4096", f"'{shapes}'")
    states = [bench.parse_state(text) for text in (schemes or (_GPU_SCHEMES if gpu else _CPU_SCHEMES)).split(",")]
    counts = numbers("--activations", activations or (_GPU_TOKENS if gpu else _CPU_TOKENS))
    kind = torch.bfloat16 if dtype == "auto" else torch_dtype(DTYPES[dtype])
    bandwidth, whence = bench.peak_bandwidth(device)
    rows = list(bench.table([(n, k) for n, k in sizes], states, counts, device, kind, backend))
    name = str(kind).removeprefix("torch.")
    if as_json:
        print(json.dumps({
            "device": runs_on(device), "dtype": name, "peak_bandwidth": bandwidth, "peak_from": whence,
            "protocol": bench.__doc__, "rows": [bench.facts(row) for row in rows],
        }, ensure_ascii=False))  # fmt: skip
    else:
        console.table(bench.HEAD, bench.cells(rows, bandwidth))
        print(f"device:   {runs_on(device)}, {name}")
        print(f"peak:     {bandwidth / 1e9:,.0f} GB/s, {whence}")
        mib, share = bench.WEIGHT_BYTES >> 20, f"{bench.ALLOWED[kind]:g}"
        print(f"protocol: {mib} MiB of equal weights take turns, all products in every round; GB/s are of the weight's bytes;")
        print(f"          each is checked against fp32, and may be off by {share} of the largest output")
    if faults := [row for row in rows if row.ours and row.fault]:
        raise CompressError(
            Problem(f"{row.what}, {row.case}", "the product by what the codes mean", row.fault, "name another --backend")
            for row in faults
        )
