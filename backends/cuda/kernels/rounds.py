"""How many sets of rows a block takes, so that the blocks of a launch end together."""

import math
from collections.abc import Callable

MOST = 8  # sets that gemv.cu has room for
FEW = 14  # wanted sets up to which the last round counts: steps of 3 and 4 tokens
START = 0.7  # what a block takes to start, in sets


def even(wanted: float, blocks: Callable[[int], float], at_once: int) -> int:
    """Sets for each block, if `wanted` would let every block run at once.

    Where that is too many, blocks run in rounds of `at_once`, and it counts how full the last one
    is: 288 blocks of 8 sets take as long as 528. `blocks` says how many there are by their sets.
    A step of 3 tokens took 10.2 ms instead of 12.1 so; of 4 this was not measured. With more the
    rounds are full enough.
    """
    if wanted <= MOST or wanted > FEW:
        return min(max(math.ceil(wanted), 1), MOST)

    def time(sets: int) -> float:
        return math.ceil(blocks(sets) / at_once) * (sets + START)

    return min(range(MOST, 0, -1), key=time)
