"""How the experts' work is cut into blocks that end together."""

import math

import pytest

pytest.importorskip("triton")

from ds4.backends.cuda.kernels.rounds import MOST, even

AT_ONCE, ROWS = 264, 128  # blocks of an H100; sets of rows of an expert


def rounds(sets: int, tiles: int) -> int:
    """How long all blocks take, in sets."""
    return math.ceil(tiles * math.ceil(ROWS / sets) / AT_ONCE) * sets


@pytest.mark.parametrize("tokens", range(1, 33))
def test_the_last_round_is_not_nearly_empty(tokens: int) -> None:
    tiles = 6 * tokens
    wanted = tiles * ROWS / AT_ONCE
    sets = even(wanted, lambda sets: tiles * math.ceil(ROWS / sets), AT_ONCE)
    assert 1 <= sets <= MOST
    assert rounds(sets, tiles) <= rounds(MOST, tiles)
    if wanted <= MOST:
        assert rounds(sets, tiles) == sets == math.ceil(wanted)
    if tokens in (3, 4):  # 288 and 384 blocks of 8 sets would take two rounds
        assert rounds(sets, tiles) < 1.1 * wanted
