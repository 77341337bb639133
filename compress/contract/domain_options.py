"""Domain options: how shares of domains follow losses while a pass trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import InputError, did_you_mean
from compress.numerics.domain_weights import Rule
from compress.numerics.scaling_law import ScalingLaw, through
from compress.spec.strict_json import parse_json

_FORM = '{"sizes": [N, N, N], "losses": {"SOURCE": [L, L, L], ...}}, a loss in nats per token for each size'


@dataclass(frozen=True)
class DomainOptions:
    """Dynamic batch loading: every `every` steps the weights of domains follow the losses of their held-out samples."""

    rule: Rule
    every: int
    samples: int
    """Samples that are drawn in all, over all domains and steps."""
    weights: tuple[float, ...]
    """The weights that training starts from; they sum to 1."""
    eta: float = 1.0
    smoothing: float = 0.0
    losses: tuple[float, ...] = ()
    """Reference losses, one for each domain."""
    family: str = ""
    """A JSON file with sizes and losses of a family, from which the reference losses follow."""

    @property
    def measures_references(self) -> bool:
        """Whether the reference losses are those of a model, on the same held-out samples."""
        return not (self.losses or self.family)

    def references(self, names: Sequence[str], parameters: int) -> list[float] | None:
        """The reference loss of each domain for a model of so many parameters; None if they are measured.

        Raises InputError for a file that does not give them.
        """
        if self.family:
            return [law.loss(parameters) for law in family_laws(self.family, names)]
        return list(self.losses) or None


def family_laws(file: str, names: Sequence[str]) -> list[ScalingLaw]:
    """The scaling law of each domain from a JSON file. Raises InputError."""
    try:
        content = parse_json(Path(file).read_bytes())
        sizes, losses = content["sizes"], content["losses"]
        found = {name: [*map(_number, numbers)] for name, numbers in losses.items()}
        sizes = [*map(_number, sizes)]
    except OSError as error:
        raise InputError(file, _FORM, error.strerror or str(error), "check the path of reference_family") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(file, _FORM, f"{type(error).__name__}: {error}", "write it so") from None
    for name in names:
        if name not in found:
            got = f"none; there are {', '.join(sorted(found))}{did_you_mean(name, list(found))}"
            raise InputError(file, f"losses of '{name}'", got, "name each source as data does, without its folder")
    if more := sorted(found.keys() - {*names}):
        raise InputError(file, f"losses of {', '.join(names)}", f"also of '{more[0]}'", "leave it out")
    laws = []
    for name in names:
        try:
            laws.append(through(sizes, found[name]))
        except ValueError as error:
            do = "give three sizes of one family, or reference_losses"
            raise InputError(f"{file}: '{name}'", "a curve through sizes and losses", str(error), do) from None
    return laws


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"a number, not {value!r}")
    return float(value)
