"""A draw from the vocabulary without sorting it (the rule is in ds4/backend.py, `sample`).

Sorted by logit, what top_k, top_p and min_p keep is a prefix each. So a draw is three searches for
the token at which a running sum reaches a goal: tokens to top_k (FIRST), probability to top_p
(CUT), and probability to u of what is kept (DRAWN). A search goes through four digits of 8 bits of
the logits' bit patterns, of which the sums of probability are known from a pass over the logits.

Probabilities are integers here, in units of 2^-33 of the largest: their sums are exact in any
order, and the searches agree with each other. The histogram of a block is a matrix product of
one-hot rows of a digit's upper and lower half, in float16, exact by 11 bits of probability at once.
CUT and DRAWN go on together: the kept sum ends with the token of CUT, thus exceeds its goal by less
than that token, and the drawn token is the one found for the goal or the next.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sample import best_of_chunks

FIRST, CUT, DRAWN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
COUNTS = tl.constexpr(3)  # tokens, where the others are probability
TABLES = tl.constexpr(4)
CELLS = tl.constexpr(256)
UNIT = tl.constexpr(2**33)
CHUNK = 1024  # logits of a program
STEP = 128


@triton.jit
def _order(x):
    """Unsigned integers that sort as the floats do, but the largest float first."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits, bits ^ 0x7FFFFFFF)
    return bits.to(tl.uint32, bitcast=True)


@triton.jit
def _logit(order):
    bits = order.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits, bits ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _probability(x, best, temperature):
    return (tl.exp(tl.minimum(x - best, 0.0) / tl.maximum(temperature, 1e-6)) * UNIT).to(tl.int64)


@triton.jit
def _limited(top_k, r, V):
    """Whether top_k leaves tokens out, and how many it keeps."""
    k = tl.load(top_k + r)
    limited = (k > 0) & (k < V)
    return limited, tl.where(limited, k, V).to(tl.int64)


@triton.jit
def _follow(tables, kind, goal, DIGITS: tl.constexpr):
    """The first digits of the token at which the running sum reaches `goal`, and the sum before."""
    i, found, before = tl.arange(0, CELLS), tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    for digit in tl.static_range(DIGITS):
        # the first digit's sums are the same for all three
        table = tl.where(kind == COUNTS, COUNTS, 0 if digit == 0 else kind)
        cells = tl.load(tables + (digit * TABLES + table) * CELLS + i)
        at = tl.minimum(tl.sum((tl.cumsum(cells, 0) + before < goal).to(tl.int32), 0), CELLS - 1)
        before += tl.sum(tl.where(i < at, cells, 0), 0)
        found = found * CELLS + at
    return found, before


@triton.jit
def _goals(
    tables, likely, r, best, temperature, top_k, top_p, min_p, u, V, TOP_K: tl.constexpr,
    DIGITS: tl.constexpr,
):  # fmt: skip
    """Goals of CUT and DRAWN; the latter is exact once CUT is known to the last digit."""
    total = tl.sum(tl.load(tables + tl.arange(0, CELLS)), 0)
    if TOP_K:
        limited, k = _limited(top_k, r, V)
        order, tokens = _follow(tables, COUNTS, k, 4)
        order = tl.where(limited, order, 0x7FFFFFFF)  # any number
        last = (k - tokens) * _of_order(order, best, temperature)
        total = tl.where(limited, _before(tables, order) + last, total)
    share = tl.load(top_p + r).to(tl.float64) * total.to(tl.float64)
    cut = share.to(tl.int64)
    cut = tl.where(cut.to(tl.float64) < share, cut + 1, cut)
    cut = tl.minimum(tl.maximum(cut, 1), total)
    kept = tl.minimum(cut, tl.load(likely + r))
    if DIGITS == 4:
        order, before = _follow(tables, CUT, cut, 4)
        last = tl.maximum(_of_order(order, best, temperature), 1)
        kept = tl.minimum(before + tl.cdiv(cut - before, last) * last, tl.load(likely + r))
    drawn = (tl.load(u + r).to(tl.float64) * kept.to(tl.float64)).to(tl.int64) + 1
    return cut, drawn


@triton.jit
def _before(tables, order):
    """Probability of all tokens before those of `order`, along the digits of FIRST."""
    i, sum = tl.arange(0, CELLS), tl.full((), 0, tl.int64)
    for digit in tl.static_range(4):
        at = (order >> (24 - 8 * digit)) % CELLS
        cells = tl.load(tables + digit * TABLES * CELLS + i)
        sum += tl.sum(tl.where(i < at, cells, 0), 0)
    return sum


@triton.jit
def _of_order(order, best, temperature):
    return _probability(_logit(order.to(tl.uint32)), best, temperature)


@triton.jit
def _best(value, r, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    return tl.max(tl.load(value + r * CHUNKS + i, i < CHUNKS, float("-inf")), 0)


@triton.jit
def _histogram(
    logits, value, tables, likely, temperature, top_k, top_p, min_p, u, V, row,
    DIGIT: tl.constexpr, KIND: tl.constexpr, TOP_K: tl.constexpr, CHUNK: tl.constexpr,
    STEP: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums by one digit of a chunk's tokens that share the digits found so far."""
    r, c, kind = tl.program_id(0), tl.program_id(1), tl.program_id(2) + KIND
    mine = tables + r * 4 * TABLES * CELLS
    best, heat = _best(value, r, CHUNKS, BLOCK), tl.load(temperature + r)
    needless = heat == 0
    if DIGIT > 0 and KIND == FIRST:
        limited, k = _limited(top_k, r, V)
        needless |= limited == 0
    if needless:
        return
    if DIGIT > 0:
        if KIND == FIRST:
            found, _ = _follow(mine, COUNTS, k, DIGIT)
        else:
            cut, drawn = _goals(
                mine, likely, r, best, heat, top_k, top_p, min_p, u, V, TOP_K, DIGIT
            )
            found, _ = _follow(mine, kind, tl.where(kind == CUT, cut, drawn), DIGIT)
    half, enough = tl.arange(0, 16), tl.load(min_p + r)
    low, middle = tl.full((16, 16), 0, tl.float32), tl.full((16, 16), 0, tl.float32)
    high, counts = tl.full((16, 16), 0, tl.float32), tl.full((16, 16), 0, tl.float32)
    above = tl.full((), 0, tl.int64)
    for start in range(0, CHUNK, STEP):
        i = c * CHUNK + start + tl.arange(0, STEP)
        x = tl.load(logits + r.to(tl.int64) * row + i, i < V, float("-inf"))
        order, p = _order(x).to(tl.int64), _probability(x, best, heat)
        inside = i < V
        if DIGIT > 0:
            inside &= order >> (32 - 8 * DIGIT) == found
        elif KIND == FIRST:
            above += tl.sum(tl.where(p.to(tl.float32) >= enough * UNIT, p, 0), 0)
        if tl.max(inside.to(tl.int32), 0) > 0:
            digit = (order >> (24 - 8 * DIGIT) & (CELLS - 1)).to(tl.int32)
            here = (half[:, None] == (digit // 16)[None, :]) & inside[None, :]
            lower = ((digit % 16)[:, None] == half[None, :]).to(tl.float16)
            low = tl.dot(tl.where(here, (p % 2048)[None, :], 0).to(tl.float16), lower, low)
            p //= 2048
            middle = tl.dot(tl.where(here, (p % 2048)[None, :], 0).to(tl.float16), lower, middle)
            p //= 2048
            high = tl.dot(tl.where(here, p[None, :], 0).to(tl.float16), lower, high)
            if TOP_K and KIND == FIRST:
                counts = tl.dot(here.to(tl.float16), lower, counts)
    sums = low.to(tl.int64) + middle.to(tl.int64) * 2048 + high.to(tl.int64) * 2048 * 2048
    cells = mine + DIGIT * TABLES * CELLS + half[:, None] * 16 + half[None, :]
    tl.atomic_add(cells + kind * CELLS, sums, sums > 0, sem="relaxed")
    if TOP_K and KIND == FIRST:
        tl.atomic_add(cells + COUNTS * CELLS, counts.to(tl.int64), counts > 0, sem="relaxed")
    if DIGIT == 0:
        tl.atomic_add(likely + r, above, sem="relaxed")


@triton.jit
def _equals(
    logits, value, tables, likely, temperature, top_k, top_p, min_p, u, equal, after, V, row,
    TOP_K: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a chunk: how many tokens have the logit found, and the first token after those."""
    r, c = tl.program_id(0), tl.program_id(1)
    mine = tables + r * 4 * TABLES * CELLS
    best, heat = _best(value, r, CHUNKS, BLOCK), tl.load(temperature + r)
    if heat == 0:
        return
    _, goal = _goals(mine, likely, r, best, heat, top_k, top_p, min_p, u, V, TOP_K, 3)
    found, _ = _follow(mine, DRAWN, goal, 4)
    i = c * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + r.to(tl.int64) * row + i, i < V, float("-inf"))
    order = _order(x).to(tl.int64)
    at = r * CHUNKS + c
    tl.store(equal + at, tl.sum(((order == found) & (i < V)).to(tl.int32), 0))
    later = tl.where((order > found) & (i < V), order * 2**31 + i, 2**63 - 1)
    tl.store(after + at, tl.min(later, 0))


@triton.jit
def _pick(
    logits, value, id, tables, likely, temperature, top_k, top_p, min_p, u, equal, after, out, V,
    row, TOP_K: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token of each row: among those of the logit found by their order, or the one after."""
    r, i = tl.program_id(0), tl.arange(0, BLOCK)
    mine = tables + r * 4 * TABLES * CELLS
    best, heat = _best(value, r, CHUNKS, BLOCK), tl.load(temperature + r)
    at, ok = r * CHUNKS + i, i < CHUNKS
    if heat == 0:
        greedy = ok & (tl.load(value + at, ok, float("-inf")) == best)
        tl.store(out + r, tl.min(tl.load(id + at, greedy, 0x7FFFFFFF), 0))
        return
    _, near = _goals(mine, likely, r, best, heat, top_k, top_p, min_p, u, V, TOP_K, 3)
    found, before = _follow(mine, DRAWN, near, 4)
    _, goal = _goals(mine, likely, r, best, heat, top_k, top_p, min_p, u, V, TOP_K, 4)
    each = tl.maximum(_of_order(found, best, heat), 1)
    nth = ((goal - before - 1) // each).to(tl.int32)
    equals = tl.load(equal + at, ok, 0)
    upto = tl.cumsum(equals, 0)
    next = tl.min(tl.load(after + at, ok, 2**63 - 1), 0)
    chunk = tl.sum((upto <= nth).to(tl.int32), 0)
    nth_there = nth - tl.sum(tl.where(i < chunk, equals, 0), 0)
    j = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + r.to(tl.int64) * row + j, j < V, float("-inf"))
    same = ((_order(x).to(tl.int64) == found) & (j < V)).to(tl.int32)
    token = tl.sum(tl.where((same > 0) & (tl.cumsum(same, 0) == nth_there + 1), j, 0), 0)
    token = tl.where(nth < tl.sum(equals, 0), token, (next % 2**31).to(tl.int32))
    tl.store(out + r, token)


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor,
    min_p: Tensor,
    u: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """(R, V) float32, any row stride, and (R,) each -> (R,) int32 tokens.

    top_k int32, None if no row has one (three launches fewer); the others float32. Rows without a
    temperature cost little; for rows of that kind alone there is sample.greedy.
    """
    rows, vocabulary = logits.shape
    value, id = best_of_chunks(logits, CHUNK)
    chunks = value.shape[1]
    device = logits.device
    sums = torch.zeros(
        rows * (4 * TABLES.value * CELLS.value + 1), dtype=torch.int64, device=device
    )
    likely, tables = sums[:rows], sums[rows:]
    equal = torch.empty(rows, chunks, dtype=torch.int32, device=device)
    after = torch.empty(rows, chunks, dtype=torch.int64, device=device)
    out = id.new_empty(rows) if out is None else out
    has = top_k is not None
    rule = (tables, likely, temperature, id if top_k is None else top_k, top_p, min_p, u)
    shape = {"TOP_K": has, "CHUNK": CHUNK, "CHUNKS": chunks}
    shape["BLOCK"] = triton.next_power_of_2(chunks)
    scalars = (vocabulary, logits.stride(0))

    def pass_over(digit: int, kind: int, kinds: int) -> None:
        _histogram[(rows, chunks, kinds)](
            logits,
            value,
            *rule,
            *scalars,
            DIGIT=digit,
            KIND=kind,
            STEP=STEP,
            **shape,
            num_warps=4,
        )

    pass_over(0, 0, 1)
    for digit in (1, 2, 3) if has else ():
        pass_over(digit, FIRST.value, 1)
    for digit in (1, 2, 3):
        pass_over(digit, CUT.value, 2)
    _equals[(rows, chunks)](logits, value, *rule, equal, after, *scalars, **shape, num_warps=4)
    _pick[(rows,)](logits, value, id, *rule, equal, after, out, *scalars, **shape, num_warps=4)
    return out
