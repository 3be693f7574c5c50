"""Launches attention_decode.cu: a few tokens, each one's keys split over blocks, then combined."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..nvrtc import Kernel, Module

ROTARY = 64
KEYS = 32  # a tile of the kernel
MANY = 512  # keys of a token
_PARTS, _MOST_SPLITS = 4, 64  # as attention_decode.cu has them


class Split(NamedTuple):
    """How a step is cut up: tiles of 16 heads a block, splits of a token's keys, blocks an SM."""

    tiles: int
    splits: int
    resident: int = 1


class _Args(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("q", "freqs", "sink", "slot", "pos", "ids")),
        *((name, ctypes.c_uint64 * 2) for name in ("codes", "scales", "tail")),
        *((name, ctypes.c_uint64) for name in ("out", "part", "stats")),
        *((name, ctypes.c_int) for name in ("q_stride", "n_ids")),
        ("size", ctypes.c_int * 2),
        *((name, ctypes.c_int) for name in ("ratio", "window", "heads", "ps", "ts", "splits")),
        ("eps", ctypes.c_float),
    )


def serves(C: int, R: int) -> bool:
    """Whether there is a kernel for packed rows of C channels, R of them rotary."""
    return R == ROTARY and C % 128 == 0 and C <= 1024


def attention(
    q: Tensor,
    freqs: Tensor,
    sink: Tensor,
    slot: Tensor,
    pos: Tensor,
    ids: Tensor | None,
    ring: Sequence[Tensor],
    pool: Sequence[Tensor],
    ratio: int,
    window: int,
    eps: float,
    out: Tensor,
    ps: int,
    ts: int,
    way: Split,
) -> None:
    """As attention.attention, for packed rows and an fp16 result; ratio 0 for no entries."""
    T, H, C = q.shape
    planes = zip(ring, pool, strict=True)
    codes, scales, tail = ((ctypes.c_uint64 * 2)(*(p.data_ptr() for p in pair)) for pair in planes)
    splits = min(way.splits, _MOST_SPLITS)
    split = T * splits * H if splits > 1 else 0
    part = torch.empty(split * C, device=q.device)
    stats = torch.empty(split * 2, device=q.device)
    arguments = _Args(
        *(x.data_ptr() for x in (q, freqs, sink, slot, pos)),
        0 if ids is None else ids.data_ptr(),
        codes,
        scales,
        tail,
        *(x.data_ptr() for x in (out, part, stats)),
        q.stride(0),
        0 if ids is None else ids.shape[1],
        (ctypes.c_int * 2)(ring[0].shape[1] - 1, pool[0].shape[1] - 1),
        *(ratio, window, H, ps, ts, splits),
        eps,
    )
    options = C // 64, way.tiles, way.resident, ring[1].shape[2]
    grid = splits, -(-H // (16 * way.tiles)), T
    _kernel("attend", *options)(grid, C // 2, arguments)
    if splits > 1:
        slices = C // 128
        parts = _PARTS if T <= 4 and splits >= _PARTS else 1
        grid, threads = ((H * slices, T, 1), 32 * parts) if parts > 1 else ((H, T, 1), 32 * slices)
        _kernel("combine", *options)(grid, threads, arguments, ctypes.c_int(parts))


def split(T: int, H: int, keys: int, blocks: int) -> Split:
    """The measured choice for T tokens of H heads, at most `keys` keys, on so many SMs."""
    tiles = 2 if T >= 8 and keys >= MANY else 1  # two tiles of heads share what a key costs
    splits = blocks // (T * -(-H // (16 * tiles)))
    return Split(tiles, max(1, min(splits, -(-keys // KEYS))))


@functools.cache
def source() -> str:
    parts = "early", "attention_decode_keys", "attention_decode_tile", "attention_decode"
    return "".join((Path(__file__).parent / f"{part}.cu").read_text("utf-8") for part in parts)


def options(warps: int, tiles: int, resident: int, scales: int) -> list[str]:
    """The compiler's: warps of 64 channels, tiles of 16 heads, bytes of scales a row."""
    values = {"WARPS": warps, "MT": tiles, "RESIDENT": resident, "SCALES": scales}
    return [f"-D{name}={value}" for name, value in values.items()]


@functools.cache
def _kernel(name: str, *given: int) -> Kernel:
    return _module(*given).kernel(name)


@functools.cache
def _module(*given: int) -> Module:
    return Module(source(), options(*given))
