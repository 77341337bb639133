"""OWL: each block's share of zeros, by outliers among its weights times inputs.

Yin et al., 2310.05175. The scores are Wanda's, |w_ij| times the root mean square of input j, of the unpruned model. Arithmetic:
compress/numerics/owl.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from compress.contract.allocator import InputAllocator, Observed, Offer, Rest
from compress.contract.tasks import Statistic
from compress.spec.sparsity import Sparsity
from compress.spec.weight_state import State, Weight

if TYPE_CHECKING:
    from compress.contract.base_passes import PruningPass


class OwlDensities(InputAllocator):
    """Gives every weight of a block the block's share of zeros."""

    def __init__(self, pass_: PruningPass) -> None:
        self.pass_ = pass_

    def offers(self, weight: Weight, state: State) -> tuple[State, ...]:
        """The share of all: whatever a block's own is, a dense tensor takes the same bytes."""
        return (self.pass_.becomes(weight, state),)

    def statistic(self, width: int) -> Statistic:
        from compress.numerics.norms import InputNorms

        return InputNorms(width)

    def statistic_bytes(self, width: int) -> int:
        return 8 * width

    def prepare(self, statistic: Any) -> Any:
        return statistic.rms()

    def cost(self, matrices: Callable[[], Iterable[Observed]]) -> float:
        from compress.numerics.owl import outlier_share

        return outlier_share(lambda: (value.float().abs_().mul_(rms) for value, rms in matrices()), self.pass_.owl_m)

    def decide(self, offers: Sequence[Offer], rest: Rest) -> dict[str, State]:
        from compress.numerics.owl import shares

        found: dict[tuple[str, int | None], float] = {}
        sizes: dict[tuple[str, int | None], int] = {}
        for offer in offers:
            place = offer.weight.stack, offer.weight.block
            found[place] = offer.costs[0] if offer.costs else 0.0
            sizes[place] = sizes.get(place, 0) + offer.weight.numel
        assert self.pass_.sparsity.fraction is not None
        own = shares(list(found.values()), list(sizes.values()), self.pass_.sparsity.fraction, self.pass_.owl_lambda)
        by_place = dict(zip(found, own, strict=True))
        return {
            offer.weight.name: State(None, Sparsity(fraction=by_place[offer.weight.stack, offer.weight.block]))
            for offer in offers
        }
