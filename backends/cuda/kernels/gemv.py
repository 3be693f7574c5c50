"""Launches gemv.cu: a few tokens (up to 32) against quantized matrices, and the experts of a step.

Activations are fp16 panels: a tensor (K / 8, N, 8), element (token n, channel k) at
[k // 8, n, k % 8]. N is the number of tokens rounded up to 1, 2, 4, 8 or a multiple of 8; what the
columns beyond the tokens hold does not matter.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..nvrtc import Kernel, Module
from ..qmatrix import QMatrix
from .gemv_arguments import (
    MOST_MATRICES,
    Copies,
    ExpertsArguments,
    Segments,
    format_number,
    matrix,
)
from .gemv_builds import TILE, Build, block_of, of_experts, of_matrices
from .rounds import FEW, MOST, even
from .router import Tiles

MOST_TOKENS = 32
_WARPS = 8
_THREADS = 32 * _WARPS
_SHARE = 512  # channels that one warp should have


@dataclass(frozen=True)
class Product:
    """One matrix, or `rows` of it from `first_row` on, its input panel, and where the product goes.

    `out` is float32 (tokens, >= rows) with any stride between tokens, or an fp16 panel.
    """

    matrix: QMatrix
    x: Tensor
    out: Tensor
    first_row: int = 0
    row_count: int = 0  # 0: all

    @property
    def rows(self) -> int:
        return self.row_count or self.matrix.rows


Matrices = tuple[QMatrix, QMatrix, QMatrix]


def panel_width(tokens: int) -> int:
    """Columns of a panel for so many tokens."""
    return next((n for n in (1, 2, 4) if tokens <= n), -(-tokens // TILE) * TILE)


def panel(channels: int, tokens: int, device: torch.device | str) -> Tensor:
    """An uninitialised fp16 panel."""
    return torch.empty(channels // 8, panel_width(tokens), 8, dtype=torch.float16, device=device)


def to_panel(x: Tensor) -> Tensor:
    """float (T, K) -> panel: for tests."""
    out = panel(x.shape[1], len(x), x.device).fill_(float("nan"))
    out[:, : len(x)] = x.clamp(-65504, 65504).half().view(len(x), -1, 8).transpose(0, 1)
    return out


def fits(m: QMatrix) -> bool:
    """Whether the kernels can read this matrix."""
    return m.cols % max(block_of(m) // 4, m.group) == 0 and m.rows % 8 == 0


def linears(products: Sequence[Product], tokens: int) -> None:
    """Every product in one launch."""
    for start in range(0, len(products), MOST_MATRICES):
        _linears(products[start : start + MOST_MATRICES], tokens)


def _linears(products: Sequence[Product], tokens: int) -> None:
    build = of_matrices([p.matrix for p in products], products[0].x.shape[1])
    segments, blocks = _segments(products, tokens)
    _kernel("linears", build)((blocks, 1, 1), _THREADS, segments)


def _segments(products: Sequence[Product], tokens: int) -> tuple[Segments, int]:
    """What gemv.cu takes, and how many blocks of threads do it."""
    segments = Segments(len(products), tokens, products[0].x.shape[1])
    share = sum(p.rows * p.matrix.cols * p.matrix.bits / 8 for p in products) / _resident_blocks()
    blocks = 0
    for segment, p in zip(segments.each, products, strict=False):
        parts = parts_of(p.matrix.cols)
        segment.matrix = matrix(p.matrix, p.first_row, p.rows)
        segment.format, segment.parts, segment.first_block = format_number(p.matrix), parts, blocks
        rows = 16 * _WARPS // parts
        segment.sets = _sets(share / (rows * p.matrix.cols * p.matrix.bits / 8), tokens)
        segment.out_half = int(p.out.dtype == torch.float16)
        segment.out_stride = p.out.shape[1] if segment.out_half else p.out.stride(0)
        segment.x, segment.out = p.x.data_ptr(), p.out.data_ptr()
        blocks += -(-p.rows // (rows * segment.sets))
    return segments, blocks


class Experts:
    """The experts of one step (spec 3.10): `begin`, then `finish` once it is routed.

    `routed` and `shared` are w1, w3, w2; x is a panel; `sizes` are tokens and picks a token. One
    of `ranks` that share the routed ones may be without the shared expert. Where experts may be
    copied first (`placed`), the shared one is left to the time of that.
    """

    def __init__(
        self,
        routed: Matrices,
        shared: Matrices,
        x: Tensor,
        sizes: tuple[int, int],
        limit: float,
        ranks: int = 1,
        has_shared: bool = True,
        placed: bool = False,
    ) -> None:
        (w1, _, w2), (s1, s3, s2) = routed, shared
        tokens, picks = sizes
        self._routed, self._shared, self._x, self._ranks = routed, shared, x, ranks
        self._has_shared, self._tiles = has_shared, tokens * picks
        shared_tiles = -(-tokens // TILE) if has_shared else 0
        count = shared_tiles + self._tiles
        self._placed = placed
        self._hidden = torch.empty(
            count, w1.rows // 8, TILE, 8, dtype=torch.float16, device=x.device
        )
        each = torch.empty(tokens * (picks + 1), w2.rows, device=x.device)
        chosen, self._of_shared = each.split([tokens * picks, tokens])
        self._of_chosen = chosen.view(tokens, picks, -1)
        self._arguments = ExpertsArguments(
            *(m.ptrs.data_ptr() for m in routed),
            *(matrix(m) for m in (w1, w2, s1, s3, s2)),
            *(format_number(m) for m in (w1, w2, s1, s2)),
            *(tokens, picks, x.shape[1], shared_tiles),
            *(0, 0, 0, 0, 0),
            *(0, 0, 0, 0),
            *(t.data_ptr() for t in (x, self._hidden, each)),
            *(0, 0),
            limit,
        )

    def begin(self, router: Product) -> None:
        """The router's product, and beside it the shared expert's gate and up."""
        if self._placed:
            linears([router], self._arguments.tokens)
            return
        s1, s3, _ = self._shared
        segments, first = _segments([router], self._arguments.tokens)
        sets = self._has_shared * s1.rows / 16 / (_resident_blocks() - first)
        blocks = first + self._take(16, sets, 0)
        kernel = _kernel("begin_experts", of_matrices((s1, s3, router.matrix), self._x.shape[1]))
        kernel((blocks, 1, 1), _THREADS, segments, ctypes.c_int(first), self._arguments)

    def finish(
        self, tiles: Tiles, weights: Tensor, copies: Copies | None = None
    ) -> tuple[Tensor, Tensor]:
        """float32 (T, picks, D) and (T, D), whose sum in that order is what the experts give.

        `weights` (T, picks) float32. `copies`: of experts that are being copied, by
        Placement.fetch just before.
        """
        self._arguments.copies, self._arguments.arrived = copies or (0, 0)
        arguments, (w1, w3, w2), (s1, s3, s2) = self._arguments, self._routed, self._shared
        arguments.tile_expert, arguments.tile_count, arguments.tile_pairs, arguments.weights = (
            t.data_ptr() for t in (tiles.expert, tiles.count, tiles.pairs, weights)
        )
        width = self._x.shape[1]
        tiles_here, at_once = self._tiles / self._ranks, _resident_blocks()
        sets = even(
            tiles_here * w1.rows / 16 / at_once,
            lambda sets: tiles_here * math.ceil(w1.rows / (16 * sets)),
            at_once,
        )
        blocks = self._take(16, sets * self._placed, sets)
        arguments.shared_later = self._placed * self._has_shared * arguments.shared_blocks
        build = of_experts((w1, w3), (s1, s3) if self._placed else (), width)
        _kernel("gate_up", build)((blocks, 1, 1), _THREADS, arguments)
        smaller, of_shared = w2.bits / s2.bits, int(self._has_shared)
        wanted = (tiles_here + of_shared / smaller) * w2.rows / 32 / at_once
        sets = even(
            wanted,
            lambda sets: (
                tiles_here * math.ceil(w2.rows / (32 * sets))
                + of_shared * math.ceil(s2.rows / (32 * _sets(sets * smaller, arguments.tokens)))
            ),
            at_once,
        )
        blocks = self._take(32, (sets if MOST < wanted <= FEW else wanted) * smaller, sets)
        _kernel("down", of_experts((w2,), (s2,), width))((blocks, 1, 1), _THREADS, arguments)
        return self._of_chosen, self._of_shared

    def _take(self, rows: int, shared_sets: float, sets: float) -> int:
        """Let a block take so many sets of `rows` rows, 0 for none: how many blocks that makes."""
        arguments = self._arguments
        wanted = self._shared[0 if rows == 16 else 2], self._routed[0 if rows == 16 else 2]
        arguments.shared_sets, arguments.sets = _sets(shared_sets, arguments.tokens), _sets(sets)
        each = [
            -(-m.rows // (rows * taken))
            for m, taken in zip(wanted, (arguments.shared_sets, arguments.sets), strict=True)
        ]
        arguments.shared_blocks, arguments.blocks = each
        shared = self._has_shared * each[0] if shared_sets else 0
        return shared + (self._tiles * each[1] if sets else 0)


def parts_of(cols: int) -> int:
    """Over how many warps to split a row."""
    parts = 1
    while parts < _WARPS and cols // (2 * parts) >= _SHARE:
        parts *= 2
    return parts


def _sets(wanted: float, tokens: int = 1) -> int:
    """How many sets of rows a block of threads takes: no more than gemv.cu has room for."""
    return min(max(math.ceil(wanted), 1), 8 if tokens <= TILE else 2)


@functools.cache
def _resident_blocks() -> int:
    """Blocks of threads that run at once."""
    return 2 * torch.cuda.get_device_properties().multi_processor_count


@functools.cache
def source() -> str:
    parts = "codes", "reader", "few", "pairs"
    names = "early", *(f"gemv_{part}" for part in parts), "gemv", "gemv_experts"
    return "".join((Path(__file__).parent / f"{name}.cu").read_text("utf-8") for name in names)


@functools.cache
def _kernel(name: str, build: Build) -> Kernel:
    return Module(source(), (*build.options, f"-DKERNEL={name}")).kernel(name, build.shared)
