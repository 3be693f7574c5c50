"""Several processes as one model: each holds a share of every layer's experts.

All run the same program on the same steps; attention and router are computed by each, experts by
whoever holds them, and `all_sum` adds up. A backend brings the transport; ds4/parallel starts the
processes, tells them the steps, and ends them together.
"""

from collections.abc import Sequence
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


def balanced(popularity: Sequence[float], ranks: Ranks) -> list[int]:
    """The experts that a rank holds if some are chosen more often: as many as by `share`.

    The most popular come first, each to the rank with the least to do of those with room.
    """
    room = [len(share(len(popularity), _Seat(rank, ranks.size))) for rank in range(ranks.size)]
    held: list[list[int]] = [[] for _ in room]
    load = [0.0] * ranks.size
    for expert in sorted(range(len(popularity)), key=lambda e: (-popularity[e], e)):
        open_ranks = [rank for rank, mine in enumerate(held) if len(mine) < room[rank]]
        rank = min(open_ranks, key=lambda rank: (load[rank], rank))
        held[rank].append(expert)
        load[rank] += popularity[expert]
    return sorted(held[ranks.rank])


class _Seat(Alone):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
