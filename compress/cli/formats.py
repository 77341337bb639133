"""`compress formats ls`: the schemes that formats hold and readers load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from compress.cli import console, options
from compress.cli.guard import guarded
from compress.spec.scheme import BITS

SCHEMES = (
    *(f"w{bits}a16g64{kind}" for bits in BITS for kind in ("", "-asym")), "w4a16g64-min", "q2_k", "q4_k", "w8a8", "w4a8g64",
    "w4a4", "w4a4-aasym", "fp8", "fp8-afp8", "fp8-block", "fp8-e5m2", "nf4g64", "fp4g64", "mxfp4", "mxfp4-amxfp4", "nvfp4",
    "nvfp4-anvfp4",
)  # fmt: skip
_DEQUANTIZE = ", dequantize"
"""Printed after a scheme that a format holds only with that option of pack."""


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Formats of pack, and their readers.")
    group.command("ls")(command)
    app.add_typer(group, name="formats")


@guarded
def command(
    scheme: Annotated[
        list[str] | None, typer.Option("--scheme", metavar="SCHEME", help="Only this one, with reasons; may be repeated.")
    ] = None,
    details: options.Details = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: options.Debug = False,
) -> None:
    """List the schemes in which each format holds a linear, and those that each reader loads; --details says why.

    Groups are of 64 columns. A whole model may be refused for further reasons: `compress plan` checks it.
    """
    import json

    from compress.kernels.dispatch import formats

    found = {name: matrix(name, scheme or SCHEMES) for name in formats()}
    if json_:
        print(json.dumps(found, ensure_ascii=False))
        return
    for name, rows in found.items():
        show(name, rows, details or bool(scheme))
        print()
    console.fact("rows", "schemes; `dequantize` where pack needs that option for it; --details says why")


def show(name: str, rows: dict[str, dict[str, tuple[str, str]]], reasons: bool) -> None:
    """Prints the schemes that a format holds, with a column for each reader, and those that it refuses; reasons if asked for."""
    held = {scheme: verdicts for scheme, verdicts in rows.items() if "" not in verdicts}
    readers = list(dict.fromkeys(reader for verdicts in held.values() for reader in verdicts))
    if held:
        console.table((name, *readers), [(s, *(verdicts[r][0] for r in readers)) for s, verdicts in held.items()])
    else:
        print(name)
    refused = [scheme for scheme in rows if not {scheme, f"{scheme}{_DEQUANTIZE}"} & held.keys()]
    if refused and not reasons:
        console.text(f"refused:  {', '.join(refused)}")
    why: dict[str, list[str]] = {}
    for scheme, verdicts in rows.items() if reasons else ():
        for reader, (loads, reason) in verdicts.items():
            why.setdefault(f"{reader}, {loads}: {reason}" if reader else f"{loads}: {reason}", []).append(scheme)
    for reason, schemes in why.items():
        console.text(reason, 4)
        if len(rows) > 1:
            console.text(f"    for {'; '.join(schemes)}", 8)


def matrix(name: str, schemes: Sequence[str]) -> dict[str, dict[str, tuple[str, str]]]:
    """scheme -> reader -> (yes, no or unknown; why); the reader "" stands for the format itself, which refuses the scheme."""
    from compress.errors import Refusal
    from compress.kernels.dispatch import load_format
    from compress.spec.scheme import Scheme
    from compress.spec.weight_state import State, Weight

    path = "model.layers.0.self_attn.q_proj"
    weight = Weight(f"{path}.weight", "BF16", (64, 256), "linear", path, module_class="Linear", stack="decoder", block=0)
    # The model has a head of its own, because readers differ on tied ones.
    head = Weight("lm_head.weight", "BF16", (256, 256), "head", "lm_head", module_class="Linear")
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for scheme in schemes:
        state = State(Scheme.parse(scheme))
        for dequantize in (False, True):
            fmt = load_format(name)(dequantize=dequantize)
            try:
                fmt.refuse(weight, state)
            except Refusal as refusal:
                found.setdefault(scheme, {"": ("refused", f"{refusal.reason}; {refusal.do}")})
                continue
            verdicts = fmt.readers([weight, head], {weight.name: state, head.name: State()})
            found[f"{scheme}{_DEQUANTIZE}" if dequantize else scheme] = {v.reader: (v.loads, v.reason) for v in verdicts}
            break
    return found
