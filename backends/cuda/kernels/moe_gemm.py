"""The experts of a step with many tokens: pairs sorted by expert, each expert's in tiles.

Two launches of gemm.cu over the routed experts, two over the shared one, and a sum over each
token's rows in a fixed order. What an expert makes of a token stays float32 until that sum: one
large channel would overflow fp16, and it costs a twentieth of the time.
"""

import functools

import torch
from torch import Tensor

from ds4.errors import BackendError

from ..qmatrix import QMatrix
from . import gemm_clusters
from .gemm import (
    TILES,
    Build,
    Chip,
    Routed,
    chip,
    combine,
    has_room,
    linear,
    permute,
    product,
    spread,
    tile,
)
from .split import Split

Expert = tuple[QMatrix, QMatrix, QMatrix]  # w1, w3, w2


def experts(
    routed: Expert,
    shared: Expert,
    x: Tensor,
    plan: Routed,
    limit: float,
    out: Tensor,
    split: Split | None = None,
) -> None:
    """out (T, D) float32 = the chosen experts' weighted sum plus the shared expert (spec 3.10).

    `x` is fp16 (T, D) in its own order. Needs (T * choices) * (2 F + 4 D) bytes of workspace. With
    `split` only what this rank has of it.
    """
    ordered = permute(x, routed[0])
    alike = spread(shared[0]) == spread(routed[0])
    if split is None or split.first:
        swiglu(shared, ordered if alike else permute(x, shared[0]), limit, out)
    each = each_expert(routed, ordered, plan, limit)
    if split is None:
        combine(each, out, plan.choices)
    else:
        split.add_up(each, out if split.first else None, out)


def each_expert(
    routed: Expert, x: Tensor, plan: Routed, limit: float, tokens: int | None = None
) -> Tensor:
    """x fp16 (T, D) permuted for w1 -> float32 (T * choices, D), by pair: weighted, not summed."""
    if tokens is None and gemm_clusters.serves(routed, len(plan.order)):
        return gemm_clusters.each_expert(routed, x, plan, limit)
    w1, w3, w2 = routed
    count = len(plan.order)
    first, last = tokens or tile_tokens(w1, count), tokens or tile_tokens(w2, count)
    hidden = torch.empty(count, w1.rows, dtype=torch.float16, device=x.device)
    product(w1, w3, x, hidden, count, first, 2, plan, limit, spread(w2))
    each = torch.empty(count, w2.rows, device=x.device)
    product(w2, None, hidden, each, count, last, 2, plan)
    return each


def swiglu(shared: Expert, x: Tensor, limit: float, out: Tensor) -> None:
    """One expert that every token meets, with weight 1; x is permuted for w1."""
    w1, w3, w2 = shared
    hidden = torch.empty(len(x), w1.rows, dtype=torch.float16, device=x.device)
    tokens, _ = tile(w1, len(x), 2 * w1.rows)
    product(w1, w3, x, hidden, len(x), tokens, 2, limit=limit, spread_out=spread(w2))
    linear(w2, hidden, out)


def tile_tokens(m: QMatrix, pairs: int) -> int:
    """Tokens a tile at most: enough for what an expert gets on average and half more."""
    sizes = _tiles((m.format, m.bits, m.group), chip(m.blob.device.index))
    return next((t for t in sizes if 2 * t * m.stack >= 3 * pairs), sizes[-1])


@functools.cache
def _tiles(kind: tuple[str, int, int], now: Chip) -> list[int]:
    """Sizes of tiles for which there is room."""
    sizes = [t for t in TILES if has_room(Build(*kind, t, 2, gated=True), now)]
    if not sizes:
        raise BackendError(f"experts in {kind[0]} are too large for this GPU: quantize them")
    return sizes
