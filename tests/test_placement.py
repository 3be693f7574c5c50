"""Experts in two memories: the rule, the ring, and models that do not notice."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4.backend import open_backend
from ds4.check import small_config
from ds4.errors import BackendError
from ds4.plan.placement import Budget, Need
from ds4.runner import Runner
from ds4.weights import load_weights
from ds4.weights.synthetic import SyntheticCheckpoint

torch = pytest.importorskip("torch")
policy = pytest.importorskip("ds4.backends.cuda.placement.policy")
from ds4.backends.cuda.placement import Placement  # noqa: E402
from ds4.backends.cuda.placement.heat import load_heat  # noqa: E402
from ds4.backends.cuda.placement.layer import MATRICES, Layer  # noqa: E402
from ds4.backends.cuda.placement.stream import Stream, plan_pass  # noqa: E402

NOWHERE = policy.NOWHERE


# the rule


def consistent(state) -> None:
    """Every expert is somewhere; slots and homes have one owner each."""
    slots, experts = len(state.owner), len(state.slot_of)
    for expert in range(experts):
        slot = state.slot_of[expert]
        assert slot != NOWHERE or state.home_of[expert] != NOWHERE
        assert slot == NOWHERE or state.owner[slot] == expert
    for slot in range(slots):
        assert state.owner[slot] < 0 or state.slot_of[state.owner[slot]] == slot
    homes = state.home_of[state.home_of != NOWHERE]
    assert len(set(homes.tolist())) == len(homes)


@st.composite
def places(draw):
    experts = draw(st.integers(2, 20))
    slots = draw(st.integers(1, experts))
    homes = draw(st.integers(experts - slots, experts))
    return experts, slots, homes


@settings(max_examples=40, deadline=None)
@given(places(), st.integers(0, 2**31))
def test_no_expert_is_ever_lost(sizes, seed) -> None:
    experts, slots, homes = sizes
    rng = np.random.default_rng(seed)
    state = policy.first_state(rng.integers(0, 3, experts), slots, homes)
    consistent(state)
    pinned = {int(e) for e in np.flatnonzero(state.home_of == NOWHERE)}
    assert len(pinned) == experts - homes
    for _ in range(12):
        chosen = np.sort(rng.choice(experts, rng.integers(1, experts + 1), replace=False))
        chosen = chosen.astype(np.int32)
        pairs = rng.integers(1, 4, len(chosen)).astype(np.int32)
        before = state.slot_of.copy()
        jobs = policy.decide(state, chosen, pairs)
        consistent(state)
        assert all(state.slot_of[e] == before[e] for e in pinned)
        for e in chosen:  # what a step needs is not evicted by it
            assert before[e] == NOWHERE or state.slot_of[e] == before[e]
        arrived = {int(e) for e in chosen if before[e] == NOWHERE and state.slot_of[e] != NOWHERE}
        assert jobs == [(state.home_of[e], state.slot_of[e]) for e in sorted(arrived)]
        left = [e for e in chosen if state.slot_of[e] == NOWHERE]
        owners = state.owner[state.owner != NOWHERE]
        free = [e for e in owners if e not in chosen and e not in pinned]
        assert not left or not free
    asked = state.counts[policy.HITS] + state.counts[policy.MISSES] + state.counts[policy.PASSED]
    assert state.counts[policy.STEPS] == 12
    assert asked > 0
    assert state.heat.sum() == state.counts[policy.PAIRS]


def test_the_wanted_stay_and_a_scan_does_not_flush_them() -> None:
    state = policy.first_state(np.zeros(64, np.int64), 16, 64)
    rng = np.random.default_rng(0)
    share = (np.arange(1, 65) ** -1.0) / (np.arange(1, 65) ** -1.0).sum()
    late = None
    for step in range(1500):
        if step == 1200:
            late = state.counts.copy()
        chosen = np.sort(rng.choice(64, 3, replace=False, p=share)).astype(np.int32)
        policy.decide(state, chosen, np.ones(3, np.int32))
    hits, misses = (state.counts - late)[[policy.HITS, policy.MISSES]]
    best = np.sort(share)[::-1][:16].sum()  # of one pick; later picks of a token are less likely
    assert hits / (hits + misses) > 0.8 * best
    assert all(state.slot_of[e] != NOWHERE for e in range(5))


def test_after_a_prompt_the_score_is_what_steps_would_have_left() -> None:
    score, pairs = np.float32([3, 0, 1]), np.int32([100, 0, 50])
    one = score.copy()
    for _ in range(50):
        one = one * policy.FADE + pairs / np.float32(50)
    np.testing.assert_allclose(policy.prompt_score(score, pairs, 50), one, rtol=1e-3)


def test_swaps_are_for_what_is_clearly_wanted_more() -> None:
    state = policy.first_state(np.array([9, 8, 7, 6, 0, 0]), 4, 4)
    assert (state.home_of == NOWHERE).tolist() == [True, True, False, False, False, False]
    state.score[:] = [5, 0, 1, 30, 90, 0]
    assert policy.swaps(state, 2) == [(1, 3)]  # 4 is not in a slot, 2 is not clearly above 0
    state.score[:] = [20, 20, 33, 37, 0, 0]
    assert policy.swaps(state, 2) == []  # as counts of the same would differ now and then


# the ring


def layer_of(state, lent=None) -> tuple[Layer, dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    layer, bytes_each = Layer(0, state, "cpu", lent=lent), (48, 32, 33 * 16)
    blobs = {}
    for m, size in zip(MATRICES, bytes_each, strict=True):
        blobs[m] = rng.integers(0, 256, (len(state.slot_of), size), dtype=np.uint8)
        layer.fill(m, torch.from_numpy(blobs[m]), lambda *s: torch.zeros(s, dtype=torch.uint8))
    return layer, blobs


@pytest.mark.parametrize("size", [3, 4, 16])
def test_each_group_finds_its_experts_in_the_ring(size: int) -> None:
    rng = np.random.default_rng(size)
    states = [policy.first_state(rng.integers(0, 5, 10), 4, 8) for _ in range(3)]
    made = [layer_of(state) for state in states]
    layers = [layer for layer, _ in made]
    for number, layer in enumerate(layers):
        layer.number = number
    stream = Stream(layers, size, "cpu")
    for _ in range(2):
        stream.begin(states)
        for layer, blobs in made:
            seen = []
            for first, stop, ptrs in stream.groups(layer.number):
                seen += range(first, stop)
                for i, m in enumerate(MATRICES):
                    for e, at in zip(range(first, stop), ptrs[i].tolist(), strict=True):
                        assert ctypes.string_at(at, blobs[m].shape[1]) == blobs[m][e].tobytes()
            assert seen == list(range(10))
    each = layers[0].expert_bytes
    assert stream.copied == 2 * 3 * 6 * each
    copied = sum(n for group in plan_pass(states, size) for _, _, n in group.runs)
    assert copied == 3 * 6


# a model


def budget_for(cfg, slots: int, homes: int, lent: int = 0) -> Budget:
    each = cfg.hidden_size * cfg.moe_intermediate_size * 4
    need = Need(cfg, 0, (each, each, each), 128, 1, cfg.n_routed_experts)
    return Budget(need, (slots,) * cfg.num_hidden_layers, homes, 64, 2, 0, lent)


def tokens_of(placement: Placement | None, cfg) -> list[int]:
    be = open_backend("torch", "cpu", "exact")
    be.placement = placement
    weights = load_weights(be, cfg, SyntheticCheckpoint(cfg))
    runner = Runner(be, cfg, weights, 128, 1, 64)
    logits = [be.download(runner.run({0: list(range(5, 45))}))]
    tokens = [int(logits[-1].argmax())]
    for i in range(24):
        if i == 12:  # lent memory is given back
            logits.append(be.download(runner.run({0: list(range(5, 40))})))
        logits.append(be.download(runner.run({0: [tokens[-1]]})))
        tokens.append(int(logits[-1].argmax()))
    return [x.tobytes() for x in logits]


def test_tokens_are_those_of_a_model_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """While experts are fetched, evicted and swapped, to the bit."""
    monkeypatch.setattr("ds4.backends.cuda.placement.placement.LOOK_EVERY", 2)
    monkeypatch.setattr(policy, "swaps", eager_swaps)
    monkeypatch.setattr("ds4.backends.cuda.placement.swap.swaps", eager_swaps)
    cfg = small_config()
    want = tokens_of(None, cfg)
    for slots, homes, lent in ((4, 8, 0), (4, 6, 0), (3, 7, 2)):
        placement = Placement(budget_for(cfg, slots, homes, lent), "cpu")
        assert tokens_of(placement, cfg) == want
        report = placement.report()
        assert report.misses.sum() > 0
        assert 0 < report.hit_rate < 1
        assert placement.swaps.count == 0 if homes == 8 else placement.swaps.count > 3
        for layer in placement.layers:
            consistent(layer.state)
            assert (layer.state.owner[layer.kept :] >= 0).all()


def eager_swaps(state, most: int) -> list[tuple[int, int]]:
    """Always one, where there is a pair: what moves must not matter."""
    here = state.owner[state.owner >= 0]
    pinned, others = (here[(state.home_of[here] == NOWHERE) == want] for want in (True, False))
    return [(int(a), int(b)) for a, b in zip(pinned[:1], others[:1], strict=False)]


def test_a_heat_map_decides_who_starts_on_the_gpu(tmp_path: Path) -> None:
    cfg, file = small_config(), tmp_path / "maps" / "heat.json"
    placement = Placement(budget_for(cfg, 3, 6), "cpu", file)
    tokens_of(placement, cfg)
    placement.save()
    heat = placement.heat()
    assert heat.sum() > 0
    np.testing.assert_array_equal(load_heat(file, *heat.shape), heat)
    again = Placement(budget_for(cfg, 3, 6), "cpu", file)
    for layer, counts in zip(again.layers, heat, strict=True):
        assert counts[layer.state.owner].min() >= np.sort(counts)[-3:].min()
        assert (layer.state.home_of[layer.state.owner[:2]] == NOWHERE).all()
    assert [p.name for p in file.parent.iterdir()] == ["heat.json"]


def test_a_card_that_shrinks_is_named() -> None:
    cfg = small_config()
    placement = Placement(budget_for(cfg, 4, 8), "cpu")
    asked = []

    def fails(step):
        raise torch.OutOfMemoryError("")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (10**9, 0))
        step = type("Step", (), {"tokens": [0]})()
        with pytest.raises(BackendError, match="another process"):
            placement.around(fails)(step)
    assert asked == ["cpu"]


def test_a_rank_places_the_experts_that_it_holds() -> None:
    held, rng = [1, 3, 4, 6, 9], np.random.default_rng(0)
    state = policy.first_state(rng.integers(0, 9, 10), 3, 4, held)
    assert np.flatnonzero(state.here).tolist() == held
    layer = Layer(0, state, "cpu")
    stack = torch.from_numpy(rng.integers(0, 256, (5, 8), dtype=np.uint8))
    for m in MATRICES:
        layer.fill(m, stack, lambda *shape: torch.zeros(shape, dtype=torch.uint8))
    for _ in range(30):
        chosen = np.sort(rng.choice(held, 2, replace=False)).astype(np.int32)
        layer.copy_in(policy.decide(state, chosen, np.ones(2, np.int32)))
        for i, expert in enumerate(held):
            assert layer.expert("w2", expert).equal(stack[i])
    stream = Stream([layer], 2, "cpu")
    stream.begin([state])
    cuts = [(group.first, group.stop) for group in plan_pass([state], 2)]
    assert cuts == [(0, 4), (4, 9), (9, 10)]  # two of the held ones each, however far apart
    for first, stop, ptrs in stream.groups(0):
        for i, expert in enumerate(held):
            if first <= expert < stop:
                at = int(ptrs[0, expert - first])
                assert ctypes.string_at(at, 8) == stack[i].numpy().tobytes()
