"""`compress generate`: a few words from a checkpoint, to see that it speaks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import console, options
from compress.cli.guard import guarded
from compress.threads import compute_threads

if TYPE_CHECKING:
    from compress.runtime.compiled_step import CompiledStep


def register(app: typer.Typer) -> None:
    app.command("generate")(command)


@guarded
def command(
    model: Annotated[str, typer.Argument(help="A checkpoint in any state: a directory, or a Hub id.", metavar="DIR")],
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="The text to continue.")],
    new_tokens: options.NewTokens = 64,
    temperature: Annotated[float, typer.Option(help="Temperature of sampling; 0 takes the likeliest token.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.", min=0, max=(1 << 63) - 1)] = 0,
    packed: Annotated[bool, typer.Option("--packed", help="Run packed weights as they are, by the kernels for them.")] = False,
    compile_: Annotated[
        bool, typer.Option("--compile", help="With --packed: run tokens by compiled code, on the CPU; compiling takes a minute.")
    ] = False,
    backend: options.Backend = None,
    device: options.On = "auto",
    dtype: options.ComputeDtype = "auto",
    repack: options.Repack = False,
    threads: options.Threads = None,
    trust_remote_code: options.Trust = False,
    debug: options.Debug = False,
) -> None:
    """Continue a prompt: a smoke test of a checkpoint, with all of it in memory.

    Computes in fp32 and expands codes as they are used; with --packed it runs as `compress.load` runs it.
    """
    from transformers.utils import logging

    from compress.checkpoint.source import open_source
    from compress.device import resolve
    from compress.errors import UsageError
    from compress.layerwise.sample import sample

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options.one_of("--dtype", dtype, options.DTYPES)
    where = resolve(device)
    asked = {"--backend": backend is not None, "--dtype": dtype != "auto", "--repack": repack, "--compile": compile_}
    if not packed and (alone := [option for option, given in asked.items() if given]):
        raise UsageError(alone[0], "--packed beside it", "it alone", "add --packed, or leave it out")
    if compile_ and where.type != "cpu":
        raise UsageError("--compile", "the CPU", f"--device {where}", "leave it out")
    checkpoint = open_source(model, trust_remote_code)
    console.warn_of_code(checkpoint)

    steps: list[CompiledStep] = []

    def static(model: Any, tokens: int) -> Any:
        from transformers import StaticCache

        return StaticCache(config=model.config, max_cache_len=tokens)

    def load() -> Any:
        from compress.runtime import artifact
        from compress.runtime.compiled_step import compile_steps
        from compress.runtime.fill import refuse_other

        if not repack:
            refuse_other(checkpoint, "--repack")
        found: Any = artifact.load(checkpoint.path, dtype, backend, str(where), repack)
        if compile_:
            steps.append(compile_steps(found))
        return found

    with compute_threads(threads):
        cache = static if compile_ else None
        print(sample(checkpoint, prompt, new_tokens, temperature, seed, load if packed else None, where, cache))
    for step in steps:
        did = (
            f"a step of one token, in {step.seconds:.1f} s"
            if step.seconds
            else "nothing: all that is new follows from the prompt"
        )
        print(f"compiled: {did}", file=sys.stderr)
