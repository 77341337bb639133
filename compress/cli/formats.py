"""`compress formats ls`: what each format holds, and who reads it."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.cli import console, options
from compress.cli.guard import guarded

SCHEMES = (
    *(f"w{bits}a16g64{kind}" for bits in (2, 3, 4, 8) for kind in ("", "-asym")), "w8a8", "w4a8g64", "fp8", "fp8-afp8",
    "fp8-block", "fp8-e5m2", "nf4g64", "fp4g64", "mxfp4", "nvfp4",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Formats of pack, and their readers.")
    group.command("ls")(verb)
    app.add_typer(group, name="formats")


@guarded
def verb(
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: options.Debug = False,
) -> None:
    """List what every format holds of a linear in groups of 64, and what each reader loads; reasons below.

    A whole model may be refused for more: `compress plan` says what holds for it.
    """
    import json

    from compress.kernels.dispatch import formats

    found = {name: matrix(name) for name in formats()}
    if json_:
        print(json.dumps(found, ensure_ascii=False))
        return
    reasons: dict[str, int] = {}
    for name, rows in found.items():
        readers = list(dict.fromkeys(reader for verdicts in rows.values() for reader in verdicts if reader))
        table = []
        for scheme, verdicts in rows.items():
            if "" in verdicts:
                cells = ["refused " + mark(verdicts[""][1], reasons), *("" for _ in readers[1:])]
            else:
                cells = [f"{verdicts[reader][0]} {mark(verdicts[reader][1], reasons)}" for reader in readers]
            table.append((scheme, *cells))
        console.table((name, *readers), table)
        print()
    for reason, number in reasons.items():
        print(f"[{number}] {reason}")


def mark(reason: str, reasons: dict[str, int]) -> str:
    """The number of a reason."""
    return f"[{reasons.setdefault(reason, len(reasons) + 1)}]"


def matrix(name: str) -> dict[str, dict[str, tuple[str, str]]]:
    """scheme -> reader -> (yes, no or unknown; why); under an empty reader why the format refuses the scheme."""
    from compress.errors import Refusal
    from compress.facts import State, Weight
    from compress.kernels.dispatch import load_format
    from compress.scheme import Scheme

    path = "model.layers.0.self_attn.q_proj"
    weight = Weight(f"{path}.weight", "BF16", (64, 128), "linear", path, module_class="Linear", stack="decoder", block=0)
    # A head of its own: readers differ on models that tie it.
    head = Weight("lm_head.weight", "BF16", (256, 128), "head", "lm_head", module_class="Linear")
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for scheme in SCHEMES:
        state = State(Scheme.parse(scheme))
        for dequantize in (False, True):
            fmt = load_format(name)(dequantize=dequantize)
            try:
                fmt.refuse(weight, state)
            except Refusal as refusal:
                found.setdefault(scheme, {"": ("refused", f"{refusal.reason}; {refusal.do}")})
                continue
            verdicts = fmt.readers([weight, head], {weight.name: state, head.name: State()})
            found[f"{scheme}, dequantize" if dequantize else scheme] = {v.reader: (v.loads, v.reason) for v in verdicts}
            break
    return found
