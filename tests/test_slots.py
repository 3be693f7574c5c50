"""How many slots there are where nobody says."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ds4.loader import Synthetic, _place, load, load_synthetic
from ds4.plan.flash import flash
from ds4.plan.memory import CHUNK, DECODED, SLACK, held_beside, working
from ds4.plan.placement import Need, divide, need_of_recipe
from ds4.plan.slots import FEW, default_slots, room, room_beside_streams

GB = 10**9


def need(recipe: str = "q8_0", context: int = 32_768) -> Need:
    return need_of_recipe(flash(), recipe, context)


def backend(free: int | None, **more: object) -> SimpleNamespace:
    return SimpleNamespace(free_memory=lambda: free, max_chunk=2048, **more)


def test_few_where_memory_is_not_known_and_on_a_mac() -> None:
    small = need("q2")
    assert default_slots(SimpleNamespace(), small, 0) == FEW
    assert default_slots(backend(None), small, 0) == FEW
    assert default_slots(backend(400 * GB), small, 86 * GB) == FEW  # a large Mac
    assert default_slots(backend(88 * GB), small, 86 * GB) == 1  # one that is full


def test_many_on_a_rig_that_holds_all_weights() -> None:
    sizes = (1, 2, 4, 8, 16, 24, 32)
    asked = need("q2")
    weights = asked.others + asked.experts
    assert default_slots(backend(140 * GB, decode_sizes=sizes), asked, weights) == 32
    count = default_slots(backend(100 * GB, decode_sizes=sizes), asked, weights)
    each, step = (f(flash(), 32_768, 2048) for f in (held_beside, working))
    assert 4 <= count < 32
    assert weights + step + count * each < 100 * GB
    assert default_slots(backend(140 * GB, decode_sizes=sizes), asked, weights, 100 * GB) == count


@pytest.mark.parametrize("memory", [32, 34, 48, 80, 96])
@pytest.mark.parametrize("context", [32_768, 131_072])
def test_slots_do_not_shorten_chunks_where_experts_stream(memory: int, context: int) -> None:
    asked = need(context=context)
    assert not room(asked, asked.others + asked.experts, memory * GB, 2048)
    count = room_beside_streams(asked, memory * GB)
    assert count >= 2
    one = divide(asked, memory * GB, 400 * GB)
    budget = divide(replace(asked, slots=count), memory * GB, 400 * GB)
    assert budget.chunk >= min(one.chunk, 4096)


def test_an_exact_cache_takes_more() -> None:
    """Rows of float32 instead of FP8 and FP4: fewer slots, and fewer experts beside them."""
    native = need("q2")
    exact = replace(native, cache="exact")
    weights = native.others + native.experts
    rows = exact.held_beside(2048) - native.held_beside(2048)
    assert rows == pytest.approx(
        43 * 2176 * 1464 + 32_768 * (21 / 4 * (1464 + 444) + 20 / 128 * 1464), rel=0.01
    )
    counts = [room(one, weights, 120 * GB, 2048) for one in (native, exact)]
    assert counts[1] < 0.75 * counts[0]
    assert divide(exact, 64 * GB, 400 * GB).resident < divide(native, 64 * GB, 400 * GB).resident
    placed: list[Need] = []
    be = SimpleNamespace(cache="exact", place=lambda need, *_: placed.append(need))
    _place(be, flash(), Synthetic("flash", "q2").source(), 1000, 2, None, drafter=7)
    assert (placed[0].cache, placed[0].slots, placed[0].drafter) == ("exact", 2, 7)


def test_all_ranks_take_the_smallest_count() -> None:
    ranks = SimpleNamespace(size=4, rank=0, all_sum=lambda x: x + np.array([0, 3, 9, 5], "f4"))
    be = backend(140 * GB, ranks=ranks, upload=lambda x: x, download=lambda x: x)
    be.decode_sizes = (32,)
    assert default_slots(be, need("q2"), 86 * GB) == 3


def test_loading_without_a_number_of_slots() -> None:
    llm = load("demo", "reference", "cpu", context=128, slots=None)
    assert llm.runner.slots == FEW
    shared = Synthetic("tiny", unique_layers=6)
    assert load_synthetic(shared, "torch", "cpu", context=128, slots=None).runner.slots == FEW


def test_the_backend_takes_chunks_as_planned() -> None:
    fast = pytest.importorskip("ds4.backends.cuda.fast").Fast
    assert (fast.max_chunk, fast.slack, fast.decode_sizes) == (CHUNK, SLACK, DECODED)
