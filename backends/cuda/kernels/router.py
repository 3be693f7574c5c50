"""The router: scores, chosen experts, and the order in which the expert kernels work
(specification 3.10).

A pair is token * K + pick. Padding (position -1) chooses experts but gets no pairs, so that no
expert is read for it alone.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .early import starts_early
from .router_kernels import TILE, add_up, choose_and_count, route_small_kernel, sort_pairs

FEW = 4  # tokens up to which one program does everything
SMALL = 32  # tokens up to which work comes in tiles of 8 pairs
TOGETHER = 16  # tokens of a program above SMALL


class Tiles(NamedTuple):
    """Work for T <= 32: tile i is `count[i]` pairs of one expert; 0 where there is no work, and of
    one token never more than 1.

    Tiles are sorted by expert, pairs by token; tiles without work come last and name expert 0.
    """

    expert: Tensor  # (P,) int32
    count: Tensor  # type: ignore[assignment]  # (P,) int32
    pairs: Tensor  # (P, 8) int32, what is beyond count being undefined


class Sorted(NamedTuple):
    """Pairs sorted by expert, stably, cut into tiles of at most `block` pairs of one expert."""

    pairs: Tensor  # (T * K,) int32; undefined beyond offsets[E]
    offsets: Tensor  # (E + 1,) int32: where each expert's pairs begin
    tile_expert: Tensor  # (tiles,) int32, -1 where there is no work
    tile_row: Tensor  # (tiles,) int32: the first pair of the tile


class Gate(NamedTuple):
    """A layer's router without its matrix: a bias, or a table of ids by token."""

    bias: Tensor | None  # (E,) float32
    table: Tensor | None  # (V, K) int64
    experts: int
    picks: int
    factor: float  # the sum of a token's weights
    held: Tensor | None = None  # (E,) int32: which experts are here; others' pairs are left out


def route_small(
    gate: Gate,
    z: Tensor,
    tokens: Tensor,
    *,
    pos: Tensor | None = None,
    hits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tiles]:
    """Logits z (T, E) float32, any row stride, T <= 32 -> ids (T, K) int32, weights (T, K), tiles.

    `tokens` and `pos` are the step's, (T,) int32. `hits` (E,) int64 counts pairs by expert.
    """
    T, K = len(z), gate.picks
    assert T <= SMALL
    numbers = torch.empty(T * K * (TILE.value + 3), dtype=torch.int32, device=z.device)
    ids, expert, count, pairs = numbers.split([T * K, T * K, T * K, T * K * TILE.value])
    weights = z.new_empty(T, K)
    block = triton.next_power_of_2(T * K)

    early = starts_early(z, T)

    def launch(programs: int, warps: int, tokens_each: int, choose: bool, order: bool) -> None:
        route_small_kernel[(programs,)](
            *_inputs(gate, z, tokens, pos), ids, weights, expert, count, pairs,
            z if hits is None else hits, gate.factor, T,
            **_shape(gate), BT=tokens_each, BP=block, STEP=min(block, 32),
            HASH=gate.table is not None, PADDED=pos is not None, SPLIT=gate.held is not None,
            COUNT=hits is not None, CHOOSE=choose, ORDER=order,
            HOLDS=1 if T == 1 else TILE.value, EARLY=early,
            num_warps=warps, launch_pdl=early,
        )  # fmt: skip

    if T <= FEW:
        padded = triton.next_power_of_2(T)
        launch(1, padded, padded, choose=True, order=True)
    else:
        launch(T, 1, 1, choose=True, order=False)
        launch(1, max(1, block // 32), 1, choose=False, order=True)
    return ids.view(T, K), weights, Tiles(expert, count, pairs.view(-1, TILE.value))


def route_many(
    gate: Gate,
    z: Tensor,
    tokens: Tensor,
    block: int,
    *,
    pos: Tensor | None = None,
    hits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Sorted]:
    """As route_small, for any T: the pairs sorted by expert, in tiles of `block` pairs."""
    T, K, shape = len(z), gate.picks, _shape(gate)
    parts, padded = triton.cdiv(T, TOGETHER), shape["EP"]
    tiles = triton.cdiv(T * K, block) + min(gate.experts, T * K)
    ids, weights = z.new_empty(T, K, dtype=torch.int32), z.new_empty(T, K)
    counts, totals = ids.new_empty(parts, padded), ids.new_empty(padded)
    plan = Sorted(
        ids.new_empty(T * K),
        ids.new_empty(gate.experts + 1),
        ids.new_empty(tiles),
        ids.new_empty(tiles),
    )
    pairs = triton.next_power_of_2(TOGETHER * K)
    flag = {"PADDED": pos is not None, "SPLIT": gate.held is not None}
    choose_and_count[(parts,)](
        *_inputs(gate, z, tokens, pos), ids, weights, counts, gate.factor, T,
        **shape, BT=TOGETHER, BP=pairs, HASH=gate.table is not None, **flag, num_warps=8,
    )  # fmt: skip
    some = min(16, padded)
    add_up[(padded // some,)](
        counts, totals, z if hits is None else hits, parts,
        EP=padded, BE=some, BN=min(128, triton.next_power_of_2(parts)), E=gate.experts,
        COUNT=hits is not None, num_warps=4,
    )  # fmt: skip
    sort_pairs[(parts + triton.cdiv(tiles, pairs),)](
        ids, z if pos is None else pos, ids if gate.held is None else gate.held,
        counts, totals, *plan, T, parts, tiles,
        E=gate.experts, EP=padded, K=K, BT=TOGETHER, BP=pairs, STEP=min(padded, pairs, 32),
        ROWS=block, **flag, num_warps=4,
    )  # fmt: skip
    return ids, weights, plan


def _inputs(gate: Gate, z: Tensor, tokens: Tensor, pos: Tensor | None) -> tuple[Tensor | int, ...]:
    bias, table, held = (z if x is None else x for x in (gate.bias, gate.table, gate.held))
    return z, z.stride(0), bias, table, tokens, tokens if pos is None else pos, held


def _shape(gate: Gate) -> dict[str, int]:
    return {
        "E": gate.experts,
        "EP": triton.next_power_of_2(gate.experts),
        "K": gate.picks,
        "KP": triton.next_power_of_2(gate.picks),
    }
