"""Ranks over mx.distributed: processes that `mlx.launch` started, on one Mac or on several.

`mlx.launch` sets MLX_RANK and says who the others are; its transport is a ring of TCP connections,
or JACCL, which is RDMA over Thunderbolt 5.
"""

import os

import mlx.core as mx

from ds4.errors import BackendError
from ds4.ranks import Alone, Ranks


class Launched:
    def __init__(self) -> None:
        try:
            self._group = mx.distributed.init(strict=True)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise BackendError(
                f"MLX_RANK is set, but its ranks cannot be joined: {reason}; "
                "start ds4 through mlx.launch, or unset MLX_RANK"
            ) from error
        self.rank, self.size = int(self._group.rank()), int(self._group.size())

    def all_sum(self, x: mx.array) -> mx.array:
        return mx.distributed.all_sum(x, group=self._group)


def join() -> Ranks:
    """The ranks that this process was started among; alone if it was not."""
    return Launched() if "MLX_RANK" in os.environ else Alone()


def held(ids: mx.array, weights: mx.array, mine: range) -> tuple[mx.array, mx.array]:
    """Ids and weights (T, K) of all experts -> of this rank's, counted from its first.

    An expert that is not here weighs nothing, and its place is taken by one that the token reads
    anyway, so that nothing more is read.
    """
    here = (ids >= mine.start) & (ids < mine.stop)
    local = mx.where(here, ids.astype(mx.int32) - mine.start, -1)
    instead = mx.maximum(local.max(-1, keepdims=True), 0)
    return mx.where(here, local, instead), mx.where(here, weights, 0)
