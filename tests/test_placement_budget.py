"""Budgets of experts in two memories, and the heat map that says which come first."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import ds4
from ds4.errors import BackendError, ConfigError
from ds4.loader import Synthetic
from ds4.plan.flash import flash
from ds4.plan.hits import hit_rates, slowest_card
from ds4.plan.placement import (
    Budget,
    divide,
    memory_bytes,
    need_of,
    need_of_recipe,
)
from ds4.ranks import Alone
from ds4.weights.synthetic import Popularity

torch = pytest.importorskip("torch")
from ds4.backends.cuda.placement import lent, opening, pinned, policy  # noqa: E402
from ds4.backends.cuda.placement.heat import load_heat, save_heat  # noqa: E402


@pytest.mark.parametrize("text", ["", "{}", '{"ds4_heat_map": 1, "pairs": [[1, 2]]}', "[1]"])
def test_a_bad_heat_map_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "heat.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"heat\.json.*remove it"):
        load_heat(file, 2, 3)
    save_heat(file, np.array([[1, -2, 3]] * 2))
    with pytest.raises(ConfigError, match="negative"):
        load_heat(file, 2, 3)


# the budget


def test_budgets_of_the_real_model() -> None:
    cfg = flash()
    native, q2 = (need_of_recipe(cfg, name, 8192, 1) for name in ("q8_0", "q2"))
    for need, share in ((native, 1 / 3), (q2, 0.6)):
        found = divide(need, 64 * 10**9, 118 * 10**9)
        assert abs(found.resident - share) < 0.05
        spent = need.fixed(found.chunk) + found.slot_bytes + found.ring_bytes
        assert 63e9 < spent <= 64e9
        short = spent - need.beside(found.chunk) - found.ring_bytes + found.lent_bytes
        rings = need.beside(found.chunk) - need.working(found.chunk)
        assert 62e9 < short + rings + need.working(32) <= 64e9
        assert found.host_bytes <= 118e9
        assert found.chunk == 8192
        assert found.homes + min(found.slots) >= cfg.n_routed_experts
    with pytest.raises(BackendError, match=r"recipe q2.* would fit"):
        divide(native, 64 * 10**9, 40 * 10**9)
    for tight, gpu, host in ((native, 24, 16), (replace(native, drafter=11 * 10**9), 64, 40)):
        with pytest.raises(BackendError, match="no recipe would fit"):
            divide(tight, gpu * 10**9, host * 10**9)
    with pytest.raises(BackendError, match="GPU memory are too few"):
        divide(native, 8 * 10**9, 200 * 10**9)
    many = divide(replace(q2, slots=40), 64 * 10**9, 118 * 10**9)
    assert many.chunk < 8192  # rings for so many sequences would take the experts' room


@pytest.mark.parametrize(
    ("recipe", "context", "gpu", "held", "chunk"),
    [
        ("q8_0", 131_072, 64, 256, 16_384),  # the link is slow: as long as there is room
        ("q8_0", 131_072, 32, 128, 8192),
        ("q2", 131_072, 64, 256, 8192),  # fast enough
        ("q2", 131_072, 32, 128, 4096),
        ("q8_0", 1000, 64, 256, 1000),
    ],
)
def test_chunks_are_as_long_as_prompts_need(
    recipe: str, context: int, gpu: int, held: int, chunk: int
) -> None:
    need = need_of_recipe(flash(), recipe, context, held=held)
    assert divide(need, gpu * 10**9, 126 * 10**9).chunk == chunk


def test_needs_of_files_are_those_of_recipes() -> None:
    model = Synthetic("flash", "q2")
    made, planned = (
        need_of(flash(), model.source(), 8192, 1),
        need_of_recipe(flash(), "q2", 8192, 1),
    )
    assert abs(made.expert - planned.expert) < 200
    assert abs(made.others - planned.others) < 0.01 * planned.others
    tables = [need_of_recipe(flash(), name, 8192, 1).table for name in ("q8_0", "q2")]
    assert tables == [129_280 * 4096 * 2, 0]  # of few bits, which one kernel unpacks, it stays
    assert need_of(flash(), Synthetic("flash", "q8_0").source(), 8192, 1).table == tables[0]


def test_sizes_are_read() -> None:
    assert memory_bytes("32GB") == 32 * 10**9
    assert memory_bytes(" 1.5 gib ") == 3 * 2**29
    assert memory_bytes(7) == 7
    assert memory_bytes(None) is None
    for wrong in ("much", "3 TB", "..GB"):
        with pytest.raises(ConfigError, match="32GB"):
            memory_bytes(wrong)


def test_a_backend_with_one_memory_says_so() -> None:
    with pytest.raises(BackendError, match="has no second memory"):
        ds4.load("demo", backend="reference", gpu_memory="2GB")


def test_an_even_share_of_a_rank() -> None:
    """Two ranks of half the experts each hold together what the budgets say."""
    cfg = flash()
    half = need_of_recipe(cfg, "q2", 8192, held=128)
    found = divide(half, 34 * 10**9, 60 * 10**9)
    assert half.experts * 2 == need_of_recipe(cfg, "q2", 8192).experts
    assert max(found.slots) <= 128 >= found.homes
    rates = hit_rates(found)
    assert rates["uniform"] < rates["skewed"] < 1
    whole = need_of_recipe(cfg, "q2", 8192)
    assert 1.6e9 < whole.others - half.others < 2.2e9  # half of the heads


def test_what_is_found_is_what_the_rule_finds() -> None:
    """Skewed routing, against the rule itself after 1,500 tokens."""
    need = replace(need_of_recipe(flash(), "q2", 8192), held=64)
    need = replace(need, cfg=replace(need.cfg, n_routed_experts=64))
    state, rng = policy.first_state(np.zeros(64, np.int64), 20, 64), np.random.default_rng(0)
    table = Popularity("skewed", 64, 6).table(rng, 3000).astype(np.int32)
    token, late = 0, state.counts
    for step in range(3000):
        if step == 1500:
            late = state.counts.copy()
        token = token if rng.random() < 0.3 else int(rng.integers(3000))
        policy.decide(state, np.sort(table[token]), np.ones(6, np.int32))
    found = (state.counts - late)[policy.HITS] / 1500 / 6
    assert hit_rates(Budget(need, (20,), 64, 512, 8, 0))["skewed"] == pytest.approx(found, abs=0.02)


@pytest.mark.parametrize(("cards", "missing"), [(2, 0.75), (4, 0.3), (2, 1.0), (1, 0.5), (3, 0.0)])
def test_a_layer_waits_for_the_card_that_misses_most(cards: int, missing: float) -> None:
    rng = np.random.default_rng(0)
    there, card = rng.random((40_000, 6)) < missing, rng.integers(0, cards, (40_000, 6))
    most = np.stack([(there & (card == c)).sum(1) for c in range(cards)]).max(0).mean()
    want = most * cards / (6 * missing) if missing else 1.0
    assert slowest_card(6, missing, cards) == pytest.approx(want, rel=0.02)


class Driver:
    """What pinned.py asks of libcuda, on the host's own memory."""

    def __init__(self, registers: bool) -> None:
        self.registers, self.calls, self.kept = registers, [], []

    def cuMemHostRegister_v2(self, address, size, flags) -> int:  # noqa: N802
        self.calls.append("register")
        return 0 if self.registers else 801

    def cuMemHostUnregister(self, address) -> int:  # noqa: N802
        self.calls.append("unregister")
        return 0

    def cuMemHostAlloc(self, pointer, size, flags) -> int:  # noqa: N802
        self.calls.append("allocate")
        self.kept.append(np.zeros(size.value, np.uint8))
        pointer._obj.value = self.kept[-1].ctypes.data
        return 0

    def cuMemFreeHost(self, address) -> int:  # noqa: N802
        self.calls.append("free")
        return 0


@pytest.mark.parametrize("registers", [True, False])
def test_pinned_blocks(monkeypatch: pytest.MonkeyPatch, registers: bool) -> None:
    driver = Driver(registers)
    monkeypatch.setattr(pinned, "driver", lambda: driver)
    for call in ("set_device", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, call, lambda device: None)
    pool = pinned.PinnedPool([5 << 20, 3 << 20], "cuda:0", 2)
    parts = [pool.take(100, 1000), pool.take(4 << 20), pool.take(3 << 20), pool.take(9, 1 << 20)]
    for i, part in enumerate(parts):
        part.fill_(i)
    assert all((part == i).all() for i, part in enumerate(parts))
    assert pool.nbytes == (6 + 4 + 10) << 20
    del parts, part, pool
    assert driver.calls.count("unregister" if registers else "free") == 3
    assert pinned.free_host_bytes() > 0


def test_free_memory_is_that_of_the_control_groups(tmp_path: Path) -> None:
    """What a group around ours allows counts, and pages of files that it holds do not."""
    own = tmp_path / "sys/fs/cgroup/system.slice/ds4.service"
    own.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/system.slice/ds4.service\n")
    assert pinned.free_host_bytes(tmp_path) == 8_192_000
    (own / "memory.max").write_text("max\n")
    (own / "memory.current").write_text("5000\n")
    assert pinned.free_host_bytes(tmp_path) == 8_192_000
    (own.parent / "memory.max").write_text("6000\n")
    (own.parent / "memory.current").write_text("5500\n")
    (own.parent / "memory.stat").write_text("anon 4500\nactive_file 300\ninactive_file 700\n")
    assert pinned.free_host_bytes(tmp_path) == 1500


def test_what_cannot_fit_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Too little host memory, with the recipe that fits; a GPU that others have taken."""
    be = SimpleNamespace(device="cuda:0", max_chunk=2048, ranks=Alone())
    monkeypatch.setattr(opening, "Placement", lambda *given: pytest.fail("it was made"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (33 * 10**9, 34 * 10**9))
    monkeypatch.setattr(opening, "free_host_bytes", lambda: 75 * 10**9)
    need = need_of_recipe(flash(), "q8_0", 8192)
    with pytest.raises(BackendError, match=r"65.0 GB of free host memory .* recipe q2 would fit"):
        opening.open_placement(need, be, None, None, None)
    with pytest.raises(BackendError, match=r"33.0 GB of 34.0 are free.*smaller --gpu-memory"):
        opening.open_placement(need, be, 34 * 10**9, None, None)


class Lender:
    """What lent.py asks of libcuda; memory for `pieces` pieces."""

    def __init__(self, pieces: int) -> None:
        self.pieces, self.made, self.mapped = pieces, [], {}

    def cuMemAddressReserve(self, pointer, size, *_) -> int:  # noqa: N802
        pointer._obj.value, self.reserved = 1 << 40, size.value
        return 0

    def cuMemCreate(self, handle, size, wanted, flags) -> int:  # noqa: N802
        if len(self.made) == self.pieces:
            return 2
        handle._obj.value = len(self.made) + 1
        self.made.append(handle._obj.value)
        return 0

    def cuMemMap(self, at, size, offset, handle, flags) -> int:  # noqa: N802
        self.mapped[at.value] = handle.value
        return 0

    def cuMemSetAccess(self, at, size, access, count) -> int:  # noqa: N802
        assert (at.value, size.value) == (1 << 40, self.reserved)
        return 0

    def cuMemUnmap(self, at, size) -> int:  # noqa: N802
        del self.mapped[at.value]
        return 0

    def cuMemRelease(self, handle) -> int:  # noqa: N802
        self.made.remove(handle.value)
        return 0

    def cuMemAddressFree(self, at, size) -> int:  # noqa: N802
        assert (at.value, size.value) == (1 << 40, self.reserved)
        self.reserved = 0
        return 0


def test_lent_memory_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Lender(3)
    monkeypatch.setattr(lent, "driver", lambda: driver)
    memory = lent.Lent(2 * lent.PIECE + 5, "cuda:0")
    assert memory.part(3, 1000) == (1 << 40, None)
    assert memory.part(1, 10) == ((1 << 40) + 3000, None)
    for _ in range(2):
        assert memory.take()
        assert list(driver.mapped) == [(1 << 40) + i * lent.PIECE for i in range(3)]
        memory.give()
        assert (driver.made, driver.mapped, memory.there) == ([], {}, False)
    driver.pieces = 2  # another process has taken some
    assert not memory.take()
    assert (driver.made, driver.mapped, memory.there) == ([], {}, False)
    del memory
    assert driver.reserved == 0
