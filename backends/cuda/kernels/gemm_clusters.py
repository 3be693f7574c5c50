"""Launches gemm_clusters.cu: experts of many tokens on Hopper, where they have enough of them.

Tokens lie in tiles: `Tiles` says which, `Tiles.fill` gathers their inputs. A tile of `size` rows
is, for each run of 64 inputs, `size` times 128 bytes, swizzled: one bulk copy to shared memory.
Sums have the order that gemm.cu gives them, so results are equal to the bit.
"""

import ctypes
import functools
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..nvrtc import Kernel, Module
from ..qmatrix import QMatrix
from . import gemm
from .gemm import Matrix, Output, Routed, address

SIZES = {  # tokens a tile, by the most
    64: (16, 24, 32, 40, 48, 56, 64),
    128: (16, 32, 48, 64, 80, 88, 96, 104, 112, 128),
    256: (32, 64, 96, 128, 144, *range(160, 225, 8), 240, 256),
}
FEWEST = 40  # tokens an expert on average
_ROOM = 6 * 128 * 256  # bytes of stages


@dataclass(frozen=True)
class Build:
    """One compilation of gemm_clusters.cu, for a kind of matrix and tiles of up to `tokens`."""

    format: str
    bits: int
    group: int
    gated: bool
    tokens: int

    def options(self) -> list[str]:
        values = {
            "GATED": int(self.gated),
            "STAGES": _ROOM // (self.tokens * 256),
            "TOKENS": self.tokens,
            "WARPS": _warps(self.tokens),
            "SIZES(X)": "".join(f"X({n})" for n in SIZES[self.tokens]),
        }
        kind = gemm.unpacking_options(self.format, self.bits, self.group)
        return kind + [f"-D{name}={value}" for name, value in values.items()]


def _warps(tokens: int) -> int:
    """That multiply, of a block: with small tiles there is room for more sums."""
    return 16 if tokens == 64 else 8


class _Work(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("x", "tiles", "pairs", "shares", "second")),
        ("out", Output),
    )


def serves(routed: tuple[QMatrix, QMatrix, QMatrix], pairs: int) -> bool:
    """Whether these experts, with so many pairs in all, go this way: it was faster with as many."""
    w1, _, w2 = routed
    return (
        pairs >= FEWEST * w1.stack
        and gemm.chip(w1.blob.device.index).wgmma
        and "f16" not in (w1.format, w2.format)
        and w1.rows % 256 == 0
        and w2.rows % 512 == 0
    )


@dataclass(frozen=True)
class Tiles:
    """Which rows of which tile have which pair; see gemm_tiles.cu."""

    tiles: Tensor  # int32 (tiles + 1, 4)
    pairs: Tensor  # int32 (rows,)
    shares: Tensor  # float32 (rows,)
    groups: Tensor  # int32 (rows / 8, 2)
    choices: int
    tokens: int

    @classmethod
    def of(cls, plan: Routed, experts: int, tokens: int | None = None) -> "Tiles":
        count, device = len(plan.order), plan.order.device
        tokens = tokens or next((n for n in SIZES if 8 * count < 7 * n * experts), 256)
        most = count // tokens + min(count, experts)
        unused = max(b - a for a, b in pairwise((0, *SIZES[tokens])))  # of a tile's rows
        rows = -(-(count + unused * most) // 16) * 16

        def integers(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        made = cls(
            *(integers(most + 1, 4), integers(rows), torch.empty(rows, device=device)),
            *(integers(rows // 8, 2), plan.choices, tokens),
        )
        _helper("plan_tiles", tokens, device.index)(
            (experts, 1, 1),
            gemm.THREADS,
            *map(address, (plan.order, plan.offsets, plan.weights)),
            ctypes.c_int(experts),
            *map(address, (made.tiles, made.pairs, made.shares, made.groups)),
        )
        return made

    def rows(self) -> int:
        return len(self.pairs)

    def fill(self, x: Tensor, out: Tensor) -> None:
        """x fp16 (T, K), permuted -> out fp16 (rows, K), in tiles."""
        width = x.shape[1]
        _helper("fill_tiles", self.tokens, x.device.index)(
            (self.rows() // 16, min(4, width // 128), 1),
            gemm.THREADS,
            *(address(x), ctypes.c_int64(x.stride(0)), address(self.tiles), address(self.pairs)),
            *(address(self.groups), ctypes.c_int(self.choices), ctypes.c_int(width), address(out)),
        )


def each_expert(
    routed: tuple[QMatrix, QMatrix, QMatrix], x: Tensor, plan: Routed, limit: float
) -> Tensor:
    """As moe_gemm.each_expert."""
    w1, w3, w2 = routed
    count, tiles = len(plan.order), Tiles.of(plan, w1.stack)
    # x in tiles is read before the results are written: they share memory
    size = max(4 * count * w2.rows, 2 * tiles.rows() * w1.cols)
    memory = torch.empty(size, dtype=torch.uint8, device=x.device)
    inputs = memory[: 2 * tiles.rows() * w1.cols].view(torch.float16)
    tiles.fill(x, inputs)
    hidden = torch.empty(tiles.rows(), w1.rows, dtype=torch.float16, device=x.device)
    product(w1, w3, inputs, hidden, tiles, limit, gemm.spread(w2))
    each = memory[: 4 * count * w2.rows].view(torch.float32).view(count, w2.rows)
    product(w2, None, hidden, each, tiles)
    return each


def product(
    first: QMatrix,
    second: QMatrix | None,
    x: Tensor,
    out: Tensor,
    tiles: Tiles,
    limit: float = 0.0,
    spread_out: int = 1,
) -> None:
    """Gated: x and out are in tiles; else out is float32 (pairs, rows)."""
    build = Build(first.format, first.bits, first.group, second is not None, tiles.tokens)
    blocks = gemm.chip(first.blob.device.index).multiprocessors // 2 * 2
    places = x, tiles.tiles, tiles.pairs, tiles.shares, second.ptrs if second else None
    output = Output(out.data_ptr(), out.stride(0), limit, spread_out)
    work = _Work(*(address(t).value for t in places), output)
    _kernel(build, x.device.index)(
        (blocks, 1, 1), 32 * _warps(tiles.tokens) + 128, Matrix(first), work
    )


@functools.cache
def source(tokens: int) -> str:
    text = gemm.read("gemm_ptx", "gemm_codes", "gemm_clusters_ptx")
    return (
        text
        + "".join(map(_product, SIZES[tokens]))
        + gemm.read("gemm_clusters_codes", "gemm_clusters")
    )


def _product(n: int) -> str:
    """C++ that multiplies with n tokens: the instruction has each of its registers by name."""
    half = n // 2
    sums = ", ".join(f"%{i}" for i in range(half))
    operands = ", ".join(f"%{half + i}" for i in range(4))
    return f"""
template <> __device__ void product<{n}>(float (&d)[{half}], const u32* a, u64 x) {{
    asm volatile("wgmma.mma_async.sync.aligned.m64n{n}k16.f32.f16.f16 "
                 "{{{sums}}}, {{{operands}}}, %{half + 4}, 1, 1, 1, 0;"
                 : {", ".join(f'"+f"(d[{i}])' for i in range(half))}
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x));
}}
"""


@functools.cache
def _kernel(build: Build, device: int | None) -> Kernel:
    return Module(source(build.tokens), build.options()).kernel("experts", _ROOM + 1024)


@functools.cache
def _helper(name: str, tokens: int, device: int | None) -> Kernel:
    options = Build("mxfp4", 4, 32, False, tokens).options()
    return Module(gemm.read("gemm_ptx", "gemm_codes", "gemm_tiles"), options).kernel(name)
