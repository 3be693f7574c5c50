"""The integers of a step in one array, as a recorded step reads them."""

import numpy as np
import torch
from ds4.backends.cuda import graph

from ds4.step import Chunk, plan, plan_decode


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


def test_tokens_on_the_device_take_their_place() -> None:
    plain = plan_decode(np.array([7, 9, 0, 0], np.int32), [1, 0], [3, 127], [4, 128], 4)
    tokens = torch.tensor([7, 9, 0, 0])
    ahead = plan_decode(tokens, [1, 0], [3, 127], [4, 128], 4)
    assert graph._key(ahead) == graph._key(plain)
    numbers = np.full(sum(x.size for x in graph._arrays(plain)), -7, np.int32)
    graph._flatten(ahead, numbers)
    graph._overwrite(torch.from_numpy(numbers), tokens)
    want = np.empty_like(numbers)
    graph._flatten(plain, want)
    np.testing.assert_array_equal(numbers, want)
    same = plan([Chunk(1, 3, [7]), Chunk(0, 127, [9])], [4, 128], pad_to=4)
    for ratio, blocks in same.emit.items():
        np.testing.assert_array_equal(plain.emit[ratio][:2], blocks)
    np.testing.assert_array_equal(plain.pos, same.pos)
