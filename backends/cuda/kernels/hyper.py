"""Hyper-connections between two sublayers in two launches (specification 3.3, 3.11).

`post_mix` takes a sublayer's output into the streams and projects them; `finish` turns the
projections into the next sublayer's normed input and the next mix. A Mix is (post (T, 4),
comb (T, 16)), float32, comb[4 j + k] from stream j to stream k.

The mix is not needed before the next post_mix. So `finish` may be split: `sublayer_input` at once,
and `next_mix`, which takes as long, in a branch of its own of the graph beside the sublayer.

The kernels for one token can start while the one before them in the stream ends: see early.py.
"""

import triton
from torch import Tensor

from ds4.errors import BackendError

from .early import starts_early
from .hyper_finish import finish_kernel
from .hyper_mix import COLUMNS, STREAMS, mix_many, mix_one

Mix = tuple[Tensor, Tensor]
Strides = tuple[int, int]  # of a float16 activation: channel k of token t is at
# k // 8 * strides[0] + t * strides[1] + k % 8; both are multiples of 8

BLOCK = 32  # channels of a tile
SINGLE = 8  # tokens up to which each has its own programs, and no tensor cores
SMALL = 32  # tokens up to which latency matters more than bytes
MOST_PIECES = 64  # above SMALL: slices of the channels, fewer the more tokens there are
LEAST_PIECES = 8


def pieces(tokens: int, width: int, single: int = SINGLE) -> int:
    """Slices of the channels whose sums `post_mix` leaves for `finish`."""
    if width % BLOCK:
        raise BackendError(f"hidden_size {width} is no multiple of {BLOCK}: use --device cpu")
    blocks = width // BLOCK
    if tokens <= SMALL:
        return blocks if tokens > single or blocks % 2 else blocks // 2
    wanted = min(MOST_PIECES, triton.next_power_of_2(max(LEAST_PIECES, 16384 // tokens)))
    while blocks % wanted:
        wanted //= 2
    return wanted


def post_mix(
    h: Tensor,
    y: Tensor,
    mix: Mix,
    fn: Tensor,
    *,
    y2: Tensor | None = None,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    partial: Tensor | None = None,
    single: int = SINGLE,
) -> tuple[Tensor, Tensor]:
    """A sublayer's output into the streams, and what `finish` needs of the new ones.

    h (T, 4, D), contiguous, and mix as `finish` gave them; the output is y, or y + y2: (T, D) with
    any row stride, and y may be (T, P, D), rows whose P parts are added in order; fn (24 or 4,
    4 D). All are float32. With `rows` (R,) int32 only these tokens are made, in that order. Returns
    streams (R or T, 4, D) and sums (R or T, pieces, 64); `out` may be h if `rows` is None. With
    `single` SMALL a token's bits are the same in every step of up to SMALL tokens, and it takes
    longer.
    """
    _, streams, width = h.shape
    if streams != STREAMS.value:
        raise BackendError(f"hc_mult is {streams}, but the GPU kernels are made for 4")
    tokens = len(h) if rows is None else len(rows)
    out = h.new_empty(tokens, streams, width) if out is None else out
    partial = _sums(h, tokens, width, single) if partial is None else partial
    second = y if y2 is None else y2
    pointers = (h, y, second, *mix, fn, h if rows is None else rows, out, partial)
    parts = y.shape[1] if y.ndim == 3 else 1
    flags = {"EMBED": False, "GATHER": rows is not None, "SECOND": y2 is not None, "PARTS": parts}
    _launch_mix(pointers, (y.stride(0), second.stride(0)), len(fn), flags, single)
    return out, partial


def embed_mix(
    table: Tensor,
    tokens: Tensor,
    fn: Tensor,
    *,
    out: Tensor | None = None,
    partial: Tensor | None = None,
    single: int = SINGLE,
) -> tuple[Tensor, Tensor]:
    """As post_mix, for the first sublayer: each stream is the token's row of table (V, D), of any
    float type; tokens (T,) int32."""
    count, width = len(tokens), table.shape[1]
    out = fn.new_empty(count, STREAMS.value, width) if out is None else out
    partial = _sums(fn, count, width, single) if partial is None else partial
    pointers = (table, fn, fn, fn, fn, fn, tokens, out, partial)
    flags = {"EMBED": True, "GATHER": True, "SECOND": False, "PARTS": 1}
    _launch_mix(pointers, (0, 0), len(fn), flags, single)
    return out, partial


def _sums(like: Tensor, tokens: int, width: int, single: int) -> Tensor:
    return like.new_empty(tokens, pieces(tokens, width, single), COLUMNS.value)


def _launch_mix(
    pointers: tuple[Tensor, ...],
    strides: tuple[int, int],
    fn_rows: int,
    flags: dict[str, int],
    single: int,
) -> None:
    *_, out, partial = pointers
    tokens, _, width = out.shape
    slices, early = partial.shape[1], starts_early(out, tokens)
    if tokens <= single:
        channels = width // slices
        mix_one[slices, tokens](
            *pointers, *strides, width, FN=fn_rows, BD=channels, EARLY=early, **flags,
            num_warps=channels // 8, launch_pdl=early,
        )  # fmt: skip
        return
    small = tokens <= SMALL
    block, channels, warps = (16, BLOCK, 4) if small else (32, BLOCK // 2, 2)
    mix_many[slices, triton.cdiv(tokens, block)](
        *pointers, *strides, width, tokens, FN=fn_rows, BT=block, BD=channels,
        STEPS=width // slices // channels, PRODUCE=small, EARLY=early, **flags,
        num_warps=warps, num_stages=2, launch_pdl=early,
    )  # fmt: skip


def finish(
    h: Tensor,
    partial: Tensor,
    scale: Tensor,
    base: Tensor,
    norm: Tensor,
    x: Tensor,
    strides: Strides,
    *,
    eps: float,
    hc_eps: float,
    rounds: int,
    mix: Mix | None = None,
) -> Mix:
    """Streams h (T, 4, D) and their sums -> a sublayer's input in x, and its mix.

    x, float16, has room for T tokens at `strides`. scale (3,), base (24,) and norm (D,) are
    float32; `rounds` are the column normalisations of Sinkhorn.
    """
    mix = _new_mix(partial) if mix is None else mix
    _launch_finish(h, partial, scale, base, norm, x, strides, eps, hc_eps, rounds, mix)
    return mix


def sublayer_input(
    h: Tensor,
    partial: Tensor,
    scale: Tensor,
    base: Tensor,
    norm: Tensor,
    x: Tensor,
    strides: Strides,
    *,
    eps: float,
    hc_eps: float,
) -> None:
    """The part of `finish` that makes x; of a head too, whose scale is (1,) and base (4,)."""
    _launch_finish(h, partial, scale, base, norm, x, strides, eps, hc_eps, 0, None)


def next_mix(
    partial: Tensor,
    scale: Tensor,
    base: Tensor,
    width: int,
    *,
    eps: float,
    hc_eps: float,
    rounds: int,
    mix: Mix | None = None,
) -> Mix:
    """The part of `finish` that makes the mix; `width` is D."""
    mix = _new_mix(partial) if mix is None else mix
    tokens, each = len(partial), _mixes_each(len(partial))
    p = partial
    finish_kernel[(triton.cdiv(tokens, each),)](
        p, p, scale, base, p, p, *mix, tokens, width, 1, 1, eps, hc_eps,
        **_constants(tokens, partial.shape[1], width), ROUNDS=rounds, EARLY=False, num_warps=4,
    )  # fmt: skip
    return mix


def _new_mix(partial: Tensor) -> Mix:
    tokens, streams = len(partial), STREAMS.value
    return partial.new_empty(tokens, streams), partial.new_empty(tokens, streams * streams)


def _mixes_each(tokens: int) -> int:
    """Tokens whose mixes one program makes."""
    return 1 if tokens <= SMALL else 8 if tokens <= 1024 else 32


def _constants(tokens: int, sums: int, width: int) -> dict[str, int | bool]:
    small, each, seen = tokens <= SMALL, _mixes_each(tokens), triton.next_power_of_2(sums)
    channels = triton.next_power_of_2(min(512, width) if small else width)
    return {
        "S": sums,
        "SLICES": triton.cdiv(width, channels),
        "BD": channels,
        "BS": seen,
        "BT": each,
        "MS": min(seen, 128 // each),
        "PRODUCE": small,
    }


def _launch_finish(
    h: Tensor,
    partial: Tensor,
    scale: Tensor,
    base: Tensor,
    norm: Tensor,
    x: Tensor,
    strides: Strides,
    eps: float,
    hc_eps: float,
    rounds: int,
    mix: Mix | None,
) -> None:
    tokens, _, width = h.shape
    constants, early = _constants(tokens, partial.shape[1], width), starts_early(h, tokens)
    mixes = triton.cdiv(tokens, constants["BT"]) if rounds else 0
    finish_kernel[(tokens * constants["SLICES"] + mixes,)](
        h, partial, scale, base, norm, x, *(mix or (h, h)),
        tokens, width, strides[0] // 8, strides[1] // 8, eps, hc_eps,
        **constants, ROUNDS=rounds, EARLY=early,
        num_warps=4 if tokens <= SMALL else 8, launch_pdl=early,
    )  # fmt: skip


def head(
    h: Tensor,
    y: Tensor,
    mix: Mix,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm: Tensor,
    rows: Tensor,
    x: Tensor,
    strides: Strides,
    *,
    eps: float,
    hc_eps: float,
    y2: Tensor | None = None,
    single: int = SINGLE,
) -> None:
    """The last sublayer's output -> normed input x of the head, for the R tokens of `rows`.

    As post_mix and sublayer_input; fn (4, 4 D), scale (1,), base (4,).
    """
    streams, partial = post_mix(h, y, mix, fn, y2=y2, rows=rows, single=single)
    sublayer_input(streams, partial, scale, base, norm, x, strides, eps=eps, hc_eps=hc_eps)
