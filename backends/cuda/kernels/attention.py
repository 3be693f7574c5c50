"""Sparse attention over cached rows: a window, compressed entries and a sink (spec 3.4, 3.8)."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from . import attention_decode as decode
from . import attention_triton as triton
from .attention_decode import Split
from .attention_triton import Tiling

MOST_SPLIT = 32  # tokens for which keys are split over blocks
HOPPER = "hopper"  # attention_hopper's kernel: a program for each token


def attention(
    q: Tensor,
    freqs: Tensor,
    sink: Tensor,
    slot: Tensor,
    pos: Tensor,
    ids: Tensor | None,
    ring: Sequence[Tensor],
    pool: Sequence[Tensor] | None,
    ratio: int,
    window: int,
    eps: float,
    out: Tensor,
    ps: int,
    ts: int,
    way: Tiling | Split | str | None = None,
    span: int = 1 << 30,
) -> None:
    """Normed and rotated heads of `q` over window, entries and sink, rotated back, into `out`.

    q: float32 (T, H, C), rows at any multiple of 4 apart. freqs: float32 (R / 2,). sink: float32
    (H,). slot, pos: int32 (T,), -1 for padding, which gets zeros. ids: int32 (T, k), -1 for none,
    or None for all (pos + 1) // ratio entries. ring, pool: planes of rows, (slots, size + 1, n)
    each: codes, scales and tail, or one of float32; pool None for no entries. out: fp16 or float32,
    channel k of token t at (k // 8) * ps + t * ts + k % 8, `ps` and `ts` multiples of 8. `way` is
    for measuring: which kernel, and how it is cut up. No position is `span` or more.
    """
    if pool is None or (ids is not None and ids.shape[1] == 0):
        ids, pool, ratio = None, ring, 0
    if len(q) == 0:
        return
    given = q, freqs, sink, slot, pos, ids, ring, pool, ratio, window, eps, out, ps, ts
    if way is None:
        entries = 0 if ratio == 0 else min(pool[0].shape[1] - 1, span // ratio)
        keys = entries if ids is None else ids.shape[1]
        fast = len(ring) == 3 and out.dtype == torch.float16
        T, H, C = q.shape
        way = choose(T, H, C, 2 * len(freqs), window + keys, fast, q.device)
    if isinstance(way, Split):
        decode.attention(*given, way)
    elif isinstance(way, Tiling):
        triton.attention(*given, way)
    else:
        from . import attention_hopper

        attention_hopper.attention(*given)


def choose(
    T: int, H: int, C: int, R: int, keys: int, fast: bool, device: torch.device
) -> Tiling | Split | str:
    """The measured choice for T tokens of H heads of C channels, R rotary, and at most `keys` keys.

    `fast` is for packed rows and an fp16 result. Raises ValueError for shapes that nothing serves.
    """
    triton.check_shape(C, R)
    if device.type != "cuda" or not fast:
        return triton.tile(T, H, not fast)
    if T > MOST_SPLIT and (C, R) == (512, 64) and _capability(device)[0] == 9:
        from . import attention_hopper

        if attention_hopper.serves(H):
            return HOPPER
    if decode.serves(C, R):
        return decode.split(T, H, keys, _multiprocessors(device))
    return triton.tile(T, H, False)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
