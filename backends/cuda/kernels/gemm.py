"""Launches gemm.cu: many tokens (more than 32, but any number works) against quantized matrices.

Activations are fp16 (T, K), rows contiguous. The kernels want the inputs in another order, which
depends on how codes are packed: `permute` makes it, once for all matrices of the same `spread`.
K is a multiple of 128; `fits` says so. Dense matrices may take another way: see dense.py.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..nvrtc import Kernel, Module
from ..qmatrix import QMatrix

STEP = 128  # inputs at a time; a row's length must be a multiple of it
THREADS = 256
TILES = (16, 32, 64, 128)  # tokens a block at most
_SIZES = (16, 32, 48, 64, 96, 112, 128)  # what a tile of an expert's tokens is rounded up to
_FORMATS = ("mxfp4", "mxfp8", "affine", "f16")  # as gemm.cu numbers them
_MOST_STAGES = 6
_ALIGN = 1024  # of the stages
_BESIDE = 3072  # bytes of shared memory at most, beside the stages: variables and the driver's


@dataclass(frozen=True)
class Build:
    """One compilation of gemm.cu, for a kind of matrix and a shape of tile.

    A block has 128 * `parts` rows (gated: 128 of w1 and the same 128 of w3) for `tokens` tokens.
    """

    format: str
    bits: int
    group: int
    tokens: int
    parts: int
    gated: bool = False
    half_out: bool = False
    mixed: bool = False  # tiles of several sizes up to `tokens`, for experts

    def sizes(self) -> tuple[int, ...]:
        return tuple(n for n in _SIZES if n <= self.tokens) if self.mixed else (self.tokens,)

    def stage_bytes(self) -> int:
        rows = 128 * self.parts
        planes = {"affine": 2, "f16": 0}.get(self.format, 1)
        total = self.tokens * STEP * 2 + rows * (STEP * self.bits // 8 + 4 * planes)
        return -(-total // 1024) * 1024

    def shape(self, chip: "Chip") -> tuple[int, int]:
        """Stages of the pipeline, and blocks a multiprocessor."""
        fewest = 3 if chip.wgmma else 2
        for blocks in (2, 1):
            room = chip.shared // blocks - _BESIDE - _ALIGN
            stages = min(_MOST_STAGES, room // self.stage_bytes())
            small = self.tokens * self.parts <= 64 and self.bits <= 6
            if stages >= fewest and (blocks == 1 or small):
                return stages, blocks
        raise ValueError(f"no room for {self}")  # `tile` keeps to what has

    def options(self, chip: "Chip") -> list[str]:
        stages, blocks = self.shape(chip)
        values = {
            "FORMAT": _FORMATS.index(self.format),
            "BITS": self.bits,
            "GROUP": self.group or STEP,
            "TOKENS": self.tokens,
            "PARTS": self.parts,
            "GATED": int(self.gated),
            "HALF_OUT": int(self.half_out),
            "STAGES": stages,
            "BLOCKS": blocks,
            "SIZES(X)": "".join(f"X({n})" for n in self.sizes()),
        }
        return [f"-D{name}={value}" for name, value in values.items()]


@dataclass(frozen=True)
class Chip:
    """What the choice of tiles depends on."""

    wgmma: bool
    multiprocessors: int
    shared: int  # bytes of shared memory of each


class Matrix(ctypes.Structure):
    _fields_ = (
        ("ptrs", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("scales_at", "biases_at", "base_at")),
        *((name, ctypes.c_int) for name in ("rows", "cols")),
    )

    def __init__(self, m: QMatrix) -> None:
        places = m.scales_at, m.biases_at, m.base_at
        super().__init__(m.ptrs.data_ptr(), *places, m.rows, m.cols)


class Output(ctypes.Structure):
    _fields_ = (
        ("at", ctypes.c_uint64),
        ("stride", ctypes.c_int64),
        ("limit", ctypes.c_float),
        ("spread", ctypes.c_int),
    )


@dataclass(frozen=True)
class Routed:
    """Which rows meet which matrix of a stack: none of it for a dense matrix.

    order int32 (P,): the (token, choice) pairs, token * choices + choice, sorted by expert;
    offsets int32 (E + 1,): where each expert's begin; weights float32 (P,), by pair.
    """

    order: Tensor
    offsets: Tensor
    weights: Tensor
    choices: int


def fits(m: QMatrix) -> bool:
    """Whether the kernels can read this matrix."""
    return m.cols % STEP == 0


def spread(m: QMatrix) -> int:
    """How far apart the two codes of a pair lie, which decides the order of the inputs."""
    return 16 // m.bits if m.bits in (2, 4, 8) else 1


def permute(x: Tensor, m: QMatrix) -> Tensor:
    """fp16 (T, K) -> fp16 (T, K): runs of 128 inputs in the order that m's product reads."""
    tokens, width = x.shape
    out = torch.empty(tokens, width, dtype=torch.float16, device=x.device)
    grid = -(-width // (8 * THREADS)), tokens, 1
    words = ctypes.c_uint64(x.data_ptr()), ctypes.c_int64(x.stride(0)), address(out)
    _helper("permute")(grid, THREADS, *words, ctypes.c_int(width), ctypes.c_int(spread(m)))
    return out


def linear(m: QMatrix, x: Tensor, out: Tensor, groups: int = 1) -> None:
    """out (T, rows) = x @ m.T, float32 or fp16 (saturating), with any stride between tokens.

    `x` is permuted. With groups, the matrix's rows and x's columns are cut into so many: rows of
    group g meet columns of group g only.
    """
    half = out.dtype == torch.float16
    rows_a_group = m.rows // groups
    tokens, parts = tile(m, len(x), rows_a_group if groups > 1 else m.rows)
    product(m, None, x, out, len(x), tokens, parts, rows_a_group=rows_a_group, half_out=half)


def tile(m: QMatrix, tokens: int, rows: int) -> tuple[int, int]:
    """Tokens and parts a block, for `tokens` in all: the fastest by a rough count of cycles."""
    kind = m.format, m.bits, m.group
    return _tile(kind, m.rows, tokens, rows, chip(m.blob.device.index))


@functools.lru_cache(4096)  # a layer asks a dozen times, which took a tenth of launching it
def _tile(
    kind: tuple[str, int, int], matrix_rows: int, tokens: int, rows: int, now: Chip
) -> tuple[int, int]:
    best, chosen = float("inf"), (16, 1)
    for t in TILES:
        for parts in (1, 2):
            if rows % (128 * parts) and parts == 2 and rows != matrix_rows:
                continue
            build = Build(*kind, t, parts)
            if not has_room(build, now):
                continue
            blocks = -(-tokens // t) * -(-matrix_rows // (128 * parts))
            waves = -(-blocks // (now.multiprocessors * build.shape(now)[1]))
            cycles = waves * (parts * max(8 * t, 440) + 200) * build.shape(now)[1]
            if cycles < best:
                best, chosen = cycles, (t, parts)
    return chosen


def has_room(build: Build, chip: Chip) -> bool:
    most = 128 if chip.wgmma else 64  # without wgmma the operands need more registers
    room = chip.shared - _BESIDE - _ALIGN
    fewest = 3 if chip.wgmma else 2
    return build.tokens <= most and room // build.stage_bytes() >= fewest


def product(
    first: QMatrix,
    second: QMatrix | None,
    x: Tensor,
    out: Tensor,
    count: int,
    tokens: int,
    parts: int,
    routed: Routed | None = None,
    limit: float = 0.0,
    spread_out: int = 1,
    rows_a_group: int = 0,
    half_out: bool = False,
) -> None:
    """One launch. `count` rows of x, or pairs, in tiles of `tokens`; gated if there is a `second`.

    Gated: out fp16 (count, rows) = silu(min(x @ first.T, limit)) * clamp(x @ second.T) * weight,
    in the order of `routed` and permuted for a next matrix of spread `spread_out`.
    """
    gated = second is not None
    kind = first.format, first.bits, first.group
    build = Build(*kind, tokens, parts, gated, half_out, mixed=routed is not None)
    tiles = -(-count // tokens) if routed is None else count // tokens + min(count, first.stack)
    grid = -(-first.rows // (128 if gated else 128 * parts)), tiles, 1
    order, offsets, weights = (
        address(None if routed is None else t)
        for t in ((routed.order, routed.offsets, routed.weights) if routed else (None, None, None))
    )
    _kernel(build, x.device.index)(
        grid,
        THREADS,
        *(address(x), ctypes.c_int64(x.stride(0)), Matrix(first)),
        *(address(second.ptrs if second else None), order, offsets),
        *(ctypes.c_int(first.stack), ctypes.c_int(routed.choices if routed else 1), weights),
        *(Output(out.data_ptr(), out.stride(0), limit, spread_out), ctypes.c_int(count)),
        ctypes.c_int(rows_a_group or first.rows),
    )


def combine(each: Tensor, out: Tensor, choices: int) -> None:
    """out (T, D) += the sum over a token's rows of `each` (T * choices, D), float32, in order."""
    tokens, width = out.shape
    grid = -(-width // (4 * THREADS)), tokens, 1
    sizes = ctypes.c_int(choices), ctypes.c_int(width)
    _helper("combine")(grid, THREADS, address(each), address(out), *sizes)


def address(t: Tensor | None) -> ctypes.c_uint64:
    return ctypes.c_uint64(0 if t is None else t.data_ptr())


@functools.cache
def chip(device: int | None) -> Chip:
    p = torch.cuda.get_device_properties(device)
    wgmma = (p.major, p.minor) == (9, 0)
    return Chip(wgmma, p.multi_processor_count, p.shared_memory_per_multiprocessor)


@functools.cache
def source(main: str = "gemm") -> str:
    """A kernel's source; `main` is gemm, gemm_unpack or gemm_helpers."""
    parts = ["gemm_ptx", "gemm_codes"] + ["gemm_products"] * (main == "gemm") + [main]
    return read(*parts)


def read(*parts: str) -> str:
    """Files of CUDA C++ as one."""
    return "".join((Path(__file__).parent / f"{part}.cu").read_text("utf-8") for part in parts)


@functools.cache
def _kernel(build: Build, device: int | None) -> Kernel:
    on = chip(device)
    shared = build.shape(on)[0] * build.stage_bytes() + _ALIGN
    return Module(source(), build.options(on)).kernel("gemm", shared)


@functools.cache
def _helper(name: str) -> Kernel:
    options = ["-DFORMAT=0", "-DBITS=4", "-DGROUP=32"]  # of no matter
    return Module(source("gemm_helpers"), options).kernel(name)


@functools.cache
def unpacking(format: str, bits: int, group: int) -> Kernel:
    """gemm_unpack.cu for one kind of matrix."""
    return Module(source("gemm_unpack"), unpacking_options(format, bits, group)).kernel("unpack")


def unpacking_options(format: str, bits: int, group: int) -> list[str]:
    values = {"FORMAT": _FORMATS.index(format), "BITS": bits, "GROUP": group or STEP}
    return [f"-D{name}={value}" for name, value in values.items()]
