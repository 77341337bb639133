"""Selectors: choose weights by class, regex or name.

A selector is one of
    linear          every linear of the blocks, experts included (the default)
    attention, mlp  the linears of a block inside, or outside, its attention
    experts         the linears of routed experts
    embeddings, head, norms
    all             every weight but those of other towers
    re:REGEX        names on disk that REGEX matches from their start
    NAME            one name on disk, with or without its `.weight`
`skip` takes the same selectors and wins over `targets`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from compress.errors import UsageError, did_you_mean
from compress.spec.weight_state import Weight

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def _in_block(weight: Weight) -> bool:
    # A matrix of no known kind is chosen as well, and then refused by name: it must not stay as it is unseen.
    known = weight.kind in ("linear", "expert") or (weight.kind == "other" and bool(weight.unclear))
    return known and weight.block is not None and not weight.stack.startswith("tower:")


CLASSES: dict[str, Callable[[Weight], bool]] = {
    "linear": _in_block,
    "attention": lambda w: _in_block(w) and w.kind != "expert" and bool(_ATTENTION.search(w.name)),
    "mlp": lambda w: _in_block(w) and w.kind != "expert" and not _ATTENTION.search(w.name),
    "experts": lambda w: _in_block(w) and w.kind == "expert",
    "embeddings": lambda w: w.kind == "embedding",
    "head": lambda w: w.kind == "head",
    "norms": lambda w: w.kind == "norm",
    "all": lambda w: not w.stack.startswith("tower:"),
}


def matches(selector: str, weight: Weight) -> bool:
    """Whether `selector` names `weight`."""
    return _named_by(selector)(weight)


def _named_by(selector: str) -> Callable[[Weight], bool]:
    """What tells whether `selector` names a weight."""
    if selector in CLASSES:
        return CLASSES[selector]
    if selector.startswith("re:"):
        rule = re.compile(selector[3:])
        return lambda weight: rule.match(weight.name) is not None
    return lambda weight: weight.name in (selector, f"{selector}.weight")


def compiled(text: str, where: str, expected: str = "a regular expression") -> re.Pattern[str]:
    """The pattern. Raises UsageError."""
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(where, expected, str(error)) from None


def check(selectors: Iterable[str]) -> None:
    """Raises UsageError for a regex that does not compile."""
    for selector in selectors:
        if selector.startswith("re:"):
            compiled(selector[3:], f"target '{selector}'", "a regular expression after re:")


def select(weights: Sequence[Weight], targets: Sequence[str], skip: Sequence[str] = ()) -> list[Weight]:
    """The weights that `targets` name and `skip` does not, in the order given.

    A selector that matches nothing is an error: a typing mistake must not become a smaller run.
    """
    check([*targets, *skip])
    for selector in [*targets, *skip]:
        if not any(map(_named_by(selector), weights)):
            if selector == "head":
                do = "it shares its tensor with the embeddings: use embeddings, or leave it out"
                raise UsageError("target 'head'", "a head with a tensor of its own", "none on disk: it is tied", do)
            known = [word for word in [*CLASSES, *(weight.name for weight in weights)] if word != selector]
            raise UsageError(
                f"target '{selector}'",
                "a selector that matches at least one weight",
                f"no match{did_you_mean(selector, known)}",
                f"use one of {', '.join(CLASSES)}, re:REGEX or a name that `compress plan` lists",
            )
    wanted, left = ([*map(_named_by, selectors)] for selectors in (targets, skip))
    return [w for w in weights if any(named(w) for named in wanted) and not any(named(w) for named in left)]
