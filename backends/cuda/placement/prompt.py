"""The experts of a long step, a group at a time as the ring brings them (see moe_gemm.py)."""

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.gemm import Routed, combine, permute, product, spread
from ..kernels.moe_gemm import Expert, swiglu, tile_tokens
from ..kernels.split import Split
from .layer import Layer
from .stream import Stream


def experts(
    stream: Stream,
    layer: Layer,
    routed: Expert,
    shared: Expert,
    x: Tensor,
    plan: Routed,
    limit: float,
    out: Tensor,
    split: Split | None,
) -> None:
    """out (T, D) float32, as moe_gemm.experts; the ring is filled meanwhile."""
    w1, w3, w2 = routed
    ordered = permute(x, w1)
    alike = spread(shared[0]) == spread(w1)
    if split is None or split.first:
        swiglu(shared, ordered if alike else permute(x, shared[0]), limit, out)
    count = len(plan.order)
    first, last = tile_tokens(w1, count), tile_tokens(w2, count)
    hidden = torch.empty(count, w1.rows, dtype=torch.float16, device=x.device)
    each = torch.empty(count, w2.rows, device=x.device)
    for start, stop, ptrs in stream.groups(layer.number):
        mine = Routed(plan.order, plan.offsets[start : stop + 1], plan.weights, plan.choices)
        gate, up, down = (replace(m, ptrs=ptrs[i]) for i, m in enumerate((w1, w3, w2)))
        product(gate, up, ordered, hidden, count, first, 2, mine, limit, spread(w2))
        product(down, None, hidden, each, count, last, 2, mine)
    if split is None:
        combine(each, out, plan.choices)
    else:
        split.add_up(each, out if split.first else None, out)
