# mypy: disable-error-code="no-untyped-def,assignment"
"""Device functions of the compressors: a block's rows weighed into one (spec 3.6)."""

import triton
import triton.language as tl


@triton.jit
def pooled(
    step,
    state,
    slot,
    block,
    C: tl.constexpr,
    B: tl.constexpr,
    RATIO: tl.constexpr,
    HALVES: tl.constexpr,
    STEP: tl.constexpr,
    AT_ONCE: tl.constexpr,
    LONG: tl.constexpr,
):
    """The rows of a block weighed into one, (1, B): a softmax over rows in each channel.

    With two halves the block before comes first, seen through the first half of its channels.
    With STEP, `step`'s tokens come from its own buffer; it is no less than their number. With LONG
    too, and `base` says of each slot which token would be at its position 0, its tokens being
    consecutive.
    """
    BEFORE: tl.constexpr = RATIO * (HALVES - 1)
    ROWS: tl.constexpr = RATIO * HALVES
    WIDTH: tl.constexpr = HALVES * C
    rows, stride, slots, positions, tokens, base_of = step
    ring, ring_size, ape = state
    c = tl.arange(0, B)[None]
    base = ring + slot * (ring_size + 1) * (2 * WIDTH)
    high = tl.full((1, B), float("-inf"), tl.float32)
    total = tl.zeros((1, B), tl.float32)
    entry = tl.zeros((1, B), tl.float32)
    for first in range(0, ROWS, AT_ONCE):
        r = first + tl.arange(0, AT_ONCE)
        p = block * RATIO - BEFORE + r
        seen = ((r < ROWS) & (p >= 0))[:, None] & (c < C)
        column = tl.where(r < BEFORE, 0, WIDTH - C)[:, None] + c
        at = base + (p % ring_size).to(tl.int64)[:, None] * (2 * WIDTH) + column
        k = tl.load(at, mask=seen, other=0.0)
        gate = tl.load(at + WIDTH, mask=seen, other=0.0)
        bias = tl.load(ape + (r % RATIO)[:, None] * WIDTH + column, mask=seen, other=0.0)
        if STEP > 0 or LONG:  # what the ring still holds there is not used
            if LONG:
                t = tl.load(base_of + slot) + p
                inside = (t >= 0) & (t < tokens)
                inside &= tl.load(slots + t, mask=inside, other=-1) == slot
                inside &= tl.load(positions + t, mask=inside, other=-1) == p
                t = tl.where(inside, t, -1)
            else:
                t = newest(slots, positions, tokens, slot, p, STEP)
            new = seen & (t >= 0)[:, None]
            at = rows + t.to(tl.int64)[:, None] * stride + column
            k = tl.where(new, tl.load(at, mask=new, other=0.0), k)
            gate = tl.where(new, tl.load(at + WIDTH, mask=new, other=0.0), gate)
        gate += bias
        gate = tl.where(seen, gate, float("-inf"))
        above = tl.maximum(high, tl.max(gate, 0)[None])
        above = tl.where(c < C, above, 0.0)
        fade = tl.exp(high - above)
        weight = tl.exp(gate - above)
        total = total * fade + tl.sum(weight, 0)[None]
        entry = entry * fade + tl.sum(weight * k, 0)[None]
        high = above
    return tl.where(c < C, entry / total, 0.0)


@triton.jit
def newest(slots, positions, tokens, slot, p, STEP: tl.constexpr):
    """Which token of the step is at each of some positions of a slot, or -1."""
    t = tl.arange(0, STEP)
    there = t < tokens
    slot_of = tl.load(slots + t, mask=there, other=-1)
    pos_of = tl.load(positions + t, mask=there, other=-1)
    hit = (slot_of == slot)[None] & (pos_of[None] == p[:, None]) & (p >= 0)[:, None]
    return tl.max(tl.where(hit, t[None], -1), 1)
