"""The arguments of gemv.cu's kernels, as it declares them."""

import ctypes
from typing import NamedTuple

from ..qmatrix import QMatrix

MOST_MATRICES = 8  # in one launch
FORMATS = ("F16", "MXFP8", "MXFP4", "A2", "A3", "A4", "A5", "A6", "A8")  # as gemv.cu numbers them


class Matrix(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_uint64),
        *((name, ctypes.c_int) for name in ("rows", "cols")),
        *((name, ctypes.c_int) for name in ("scales_at", "biases_at", "base_at", "pad")),
    )


class Segment(ctypes.Structure):
    _fields_ = (
        ("matrix", Matrix),
        *((name, ctypes.c_int) for name in ("format", "parts", "sets", "first_block")),
        *((name, ctypes.c_int) for name in ("out_half", "out_stride")),
        ("x", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
    )


class Segments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("count", "tokens")),
        ("each", Segment * MOST_MATRICES),
    )


class ExpertsArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("w1", "w3", "w2")),
        *((name, Matrix) for name in ("up", "down", "shared1", "shared3", "shared2")),
        *((name, ctypes.c_int) for name in ("up_format", "down_format")),
        *((name, ctypes.c_int) for name in ("shared_up_format", "shared_down_format")),
        *((name, ctypes.c_int) for name in ("tokens", "picks", "shared_tiles")),
        *((name, ctypes.c_int) for name in ("shared_sets", "sets", "shared_blocks", "blocks")),
        ("shared_later", ctypes.c_int),
        *((name, ctypes.c_uint64) for name in ("tile_expert", "tile_count", "tile_pairs")),
        *((name, ctypes.c_uint64) for name in ("weights", "x", "hidden", "out")),
        *((name, ctypes.c_uint64) for name in ("copies", "arrived")),
        ("limit", ctypes.c_float),
    )


class Copies(NamedTuple):
    """Of a layer in two memories: addresses where kernels see which experts are being copied."""

    jobs: int  # int32: how many are; whether their w1 and w3 are there
    arrived: int  # int32 for each expert: 0 while w2 is on its way


def matrix(m: QMatrix, first: int = 0, rows: int = 0) -> Matrix:
    """As gemv.cu takes it; from row `first` on, where the other parts' rows lie accordingly."""
    skipped = first * m.cols * m.bits // 8
    scales = first * m.cols // max(m.group, 1) * (2 if m.format == "affine" else 1)
    places = m.scales_at + scales - skipped, m.biases_at + scales - skipped, m.base_at - skipped
    return Matrix(m.address + skipped, rows or m.rows, m.cols, *places, 0)


def format_name(m: QMatrix) -> str:
    """The format as gemv.cu calls it."""
    if m.format != "affine":
        return m.format.upper()
    return f"A{m.bits}" + ("+GROUP128" if m.group == 128 else "")


def format_number(m: QMatrix) -> int:
    name, _, wide = format_name(m).partition("+")
    return FORMATS.index(name) + (16 if wide else 0)
