"""Several processes as one model: each holds a share of every layer's experts.

All run the same program on the same steps; attention, router and shared expert are computed by
each, routed experts by whoever holds them, and `all_sum` adds up. A backend brings the transport.
"""

from typing import Protocol

from .backend import Array
from .errors import BackendError


class Ranks(Protocol):
    """The processes of one model, seen from one of them."""

    rank: int  # from 0
    size: int

    def all_sum(self, x: Array) -> Array:
        """The sum of every rank's `x`, the same bits on each of them; all must call it alike."""


class Alone:
    """One process with everything."""

    rank, size = 0, 1

    def all_sum(self, x: Array) -> Array:
        return x


def share(experts: int, ranks: Ranks) -> range:
    """The experts that a rank holds. Raises BackendError if some rank would hold none."""
    if experts < ranks.size:
        raise BackendError(f"{experts} experts cannot be split over {ranks.size} ranks: use fewer")
    return range(experts * ranks.rank // ranks.size, experts * (ranks.rank + 1) // ranks.size)
