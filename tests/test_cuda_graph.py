"""The integers of a step in one array, as a recorded step reads them."""

import numpy as np
import torch
from ds4.backends.cuda import graph

from ds4.step import Chunk, plan


def test_a_step_comes_back_from_one_array() -> None:
    first = plan([Chunk(0, 3, [7]), Chunk(2, 127, [9])], [4, 128], pad_to=4)
    later = plan([Chunk(1, 130, [5]), Chunk(0, 8, [6])], [4, 128], pad_to=4)
    assert graph._key(first) == graph._key(later)
    numbers = np.full(sum(x.size for x in graph._arrays(first)), -7, np.int32)
    seen = graph._spread(first, torch.from_numpy(numbers))  # views: they show what is written next
    for step in (first, later):
        graph._flatten(step, numbers)
        for name in ("tokens", "slot", "pos", "last"):
            np.testing.assert_array_equal(getattr(seen, name).numpy(), getattr(step, name))
        for ratio, blocks in step.emit.items():
            np.testing.assert_array_equal(seen.emit[ratio].numpy(), blocks)


def test_steps_of_other_shapes_are_recorded_apart() -> None:
    one, more = plan([Chunk(0, 3, [7])], [4], pad_to=1), plan([Chunk(0, 3, [7])], [4], pad_to=2)
    further = plan([Chunk(0, 300, [7])], [4], pad_to=1)
    assert len({graph._key(step) for step in (one, more, further)}) == 3
