"""How many sequences to hold at once where nobody says: few on a Mac or a CPU, many on a rig."""

from dataclasses import replace
from typing import Any

import numpy as np

from .memory import recorded_tokens
from .placement import SLOTS_SHARE, Need, long_chunk

FEW = 4  # where steps are not recorded for more, and where memory is not known
LONG = 4096  # tokens of a chunk that slots are never to make shorter
SHARE = 0.8  # of what weights leave that slots may take; the rest is for snapshots and fragments


def default_slots(be: Any, need: Need, weights: int, limit: int | None = None) -> int:
    """Slots for a model of `weights` bytes on this rank of a backend; all ranks get the same.

    `need` is for one slot. Where experts stream from host memory, a prompt's chunks of LONG tokens
    are worth more than slots: these only take what such chunks leave.
    `limit`: bytes of the device that may be used, if not what is free.
    """
    need = replace(need, backend=getattr(be, "name", need.backend))
    sizes = getattr(be, "decode_sizes", ())
    most = max(sizes, default=FEW)
    free, count = be.free_memory() if hasattr(be, "free_memory") else None, FEW
    if free is not None:
        memory, beside = min(free, limit or free), weights
        if sizes:
            beside += replace(need, slots=most).recorded(recorded_tokens(be.max_chunk))
        count = room(need, beside, memory, be.max_chunk)
        if not count and hasattr(be, "place"):
            count = room_beside_streams(need, memory)
    return _agreed(be, max(1, min(most, count)))


def room(need: Need, weights: int, memory: int, chunk: int) -> int:
    """Slots that `memory` bytes have room for beside all weights, 0 if these do not fit."""
    chunk = min(chunk, need.context)
    each = need.held_beside(chunk)
    left = memory - need.reserve - weights - need.working(chunk)
    return max(1, int(SHARE * left // each)) if left >= each else 0


def room_beside_streams(need: Need, memory: int) -> int:
    """Slots of a GPU that experts stream to: what long chunks leave of a share of it."""
    chunk = min(LONG, long_chunk(need, memory))
    left = int(SLOTS_SHARE * memory) - need.working(chunk)
    return max(1, left // need.held_beside(chunk))


def _agreed(be: Any, count: int) -> int:
    """The smallest of all ranks' counts: caches are alike on all."""
    ranks = getattr(be, "ranks", None)
    if ranks is None or ranks.size == 1:
        return count
    counts = np.zeros(ranks.size, np.float32)
    counts[ranks.rank] = count
    return int(be.download(ranks.all_sum(be.upload(counts))).min())
