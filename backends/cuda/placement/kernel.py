"""Launches place.cu: a step's missing experts are chosen places for, and copied into them."""

import ctypes
import functools
from pathlib import Path

from torch import Tensor

from ..nvrtc import Kernel, Module

THREADS = 256
MOST_EXPERTS, MOST_TILES = 1024, 512
BLOCKS = 64  # that copy: more are no faster (bench.link), and what is copied first is there later


class Arguments(ctypes.Structure):
    """place.cu's Layer."""

    _fields_ = (
        *((name, ctypes.c_uint64 * 3) for name in ("ptrs", "slots", "lent", "homes", "bytes")),
        *((name, ctypes.c_uint64) for name in ("slot_of", "home_of", "owner", "score")),
        *((name, ctypes.c_uint64) for name in ("heat", "counts", "arrived", "jobs", "started")),
        ("fade", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("experts", "slot_count", "kept")),
    )


def fetch(layer: Arguments, expert: Tensor, count: Tensor) -> None:
    """Let the experts of a step's tiles be where they are read fastest: two launches.

    `expert`, `count` int32 (tiles,): kernels/router.py's Tiles, sorted by expert.
    """
    assert len(expert) <= MOST_TILES
    decide, copy = _kernels(expert.device.index)
    pointers = (ctypes.c_uint64(x.data_ptr()) for x in (expert, count))
    decide((1, 1, 1), THREADS, layer, *pointers, ctypes.c_int(len(expert)))
    copy((BLOCKS, 1, 1), THREADS, layer)


def source() -> str:
    here = Path(__file__).parent
    parts = here.parent / "kernels" / "early.cu", here / "place.cu"
    return "".join(part.read_text("utf-8") for part in parts)


def options() -> list[str]:
    """The compiler's. Products and sums are rounded apart, as in policy.py."""
    return ["--fmad=false", f"-DEXPERTS={MOST_EXPERTS}", f"-DTILES={MOST_TILES}"]


@functools.cache
def _kernels(device: int | None) -> tuple[Kernel, Kernel]:
    module = Module(source(), options())
    return module.kernel("decide"), module.kernel("fetch")
