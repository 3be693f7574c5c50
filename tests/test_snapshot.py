"""Snapshots: rows as bytes, and a sequence that goes on from them as if it had never stopped."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ds4.backends.cuda import rows as packed
from ds4.backends.cuda.saving import Saving

from ds4.backend import CacheMode, RowKind, RowRange, open_backend
from ds4.engine import snapshot
from ds4.loader import Synthetic
from ds4.quant import formats
from ds4.quant.rows import RowFormat
from ds4.runner import Runner
from ds4.weights import load_weights

MODEL = Synthetic("tiny")
CONTEXT, CHUNK = 448, 64


def make_runner(backend: str, cache: CacheMode = "native", slots: int = 2) -> Runner:
    be = open_backend(backend, "cpu", cache)
    cfg = MODEL.config()
    weights = load_weights(be, cfg, MODEL.source())
    return Runner(be, cfg, weights, CONTEXT, slots, CHUNK, identity=lambda: "tiny")


def feed(runner: Runner, slot: int, ids: list[int]) -> Any:
    for start in range(0, len(ids), CHUNK):
        logits = runner.run({slot: ids[start : start + CHUNK]})
    return runner.be.download(logits)


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, 300, count).tolist()


def grid_rows(form: RowFormat, count: int = 40) -> np.ndarray:
    """Rows as they are stored, of all sizes; some channels, groups and rows are zero."""
    rng = np.random.default_rng(form.width)
    x = rng.standard_normal((count, form.width)) * 2.0 ** rng.integers(-40, 20, (count, 1))
    x = (x * 2.0 ** rng.integers(-12, 3, x.shape)).astype(np.float32)
    x[0], x[1, ::3], x[2, :64] = 0, 0, 0
    if form.kind == "kv":
        return formats.round_kv(x, form.rotary)
    return formats.round_q4(x) if form.kind == "index" else x


FORMS = [
    RowFormat("kv", 512, 64),
    RowFormat("kv", 192, 64),
    RowFormat("index", 128),
    RowFormat("float", 10),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.kind}{f.width}")
def test_rows_come_back_exactly(form: RowFormat, backend: str) -> None:
    be = open_backend(backend, "cpu")
    rows = be.alloc(form.kind, 3, 40, form.width, form.rotary)
    x, data = grid_rows(form), form.encode(grid_rows(form)).ravel()
    assert data.size == 40 * form.row_bytes
    be.restore(1, [RowRange(rows, 0, 25), RowRange(rows, 25, 40)], data)
    np.testing.assert_array_equal(be.download(rows.data)[1, :40], x)
    np.testing.assert_array_equal(be.save(1, [RowRange(rows, 0, 40)]), data)
    be.copy(1, 2, [RowRange(rows, 3, 9)])
    np.testing.assert_array_equal(
        be.save(2, [RowRange(rows, 3, 9)]), be.save(1, [RowRange(rows, 3, 9)])
    )
    assert not be.download(rows.data)[[0, 0, 2], 9:].any()


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.kind}{f.width}")
def test_packed_rows_have_the_same_bytes(form: RowFormat) -> None:
    be = Saving()
    be.device = "cpu"
    kind: RowKind = form.kind
    rows = packed.alloc(kind, 2, 40, form.width, form.rotary, "native", "cpu")
    data = form.encode(grid_rows(form)).ravel()
    be.restore(0, [RowRange(rows, 0, 40)], data)
    np.testing.assert_array_equal(rows.float32(0).numpy(), grid_rows(form))
    be.copy(0, 1, [RowRange(rows, 2, 40)])
    np.testing.assert_array_equal(be.save(1, [RowRange(rows, 2, 40)]), data[2 * form.row_bytes :])
    assert not torch.equal(rows.float32(1), rows.float32(0))


@pytest.fixture(scope="module")
def runners() -> Iterator[Any]:
    made: dict[Any, Runner] = {}

    def get(backend: str, cache: CacheMode) -> Runner:
        if (backend, cache) not in made:
            made[backend, cache] = make_runner(backend, cache)
        return made[backend, cache]

    yield get
    made.clear()


def everything(runner: Runner, slot: int, length: int) -> bytes:
    """All that a continuation reads."""
    pages = snapshot.save_pages(runner, slot, 0, length // 128 * 128)
    return (
        pages.tobytes() + snapshot.save_ending(runner, slot, length // 128 * 128, length).tobytes()
    )


CASES = [
    ("native", 1),
    ("native", 127),
    ("native", 128),
    ("native", 129),
    ("native", 300),
    ("exact", 203),
]


@pytest.mark.parametrize(("cache", "length"), CASES)
def test_a_restored_sequence_goes_on_as_if_it_had_not_stopped(
    runners: Any, backend: str, cache: CacheMode, length: int
) -> None:
    runner = runners(backend, cache)
    ids = some_tokens(length + 70, seed=length)
    runner.rewind(0, 0)
    feed(runner, 0, ids[:length])
    pages = length // 128 * 128
    rows = snapshot.save_pages(runner, 0, 0, pages)
    ending = snapshot.save_ending(runner, 0, pages, length)
    want = feed(runner, 0, ids[length:])

    runner.rewind(1, 0)
    feed(runner, 1, some_tokens(400, seed=7))  # what another sequence left
    runner.rewind(1, 0)
    snapshot.restore_pages(runner, 1, 0, pages, rows)
    snapshot.restore_ending(runner, 1, pages, length, ending)
    assert runner.lengths[1] == length
    np.testing.assert_array_equal(feed(runner, 1, ids[length:]), want)
    assert everything(runner, 1, length + 70) == everything(runner, 0, length + 70)


def test_a_fork_goes_on_like_its_source(runners: Any, backend: str) -> None:
    runner = runners(backend, "native")
    ids = some_tokens(300)
    runner.rewind(0, 0)
    feed(runner, 0, ids)
    snapshot.fork(runner, 0, 1, 281)
    assert runner.lengths[1] == 281
    runner.rewind(0, 281)
    want = feed(runner, 0, ids[:40])
    np.testing.assert_array_equal(feed(runner, 1, ids[:40]), want)
    assert everything(runner, 1, 321) == everything(runner, 0, 321)
    with pytest.raises(ValueError, match="no longer holds"):
        snapshot.fork(runner, 0, 1, 200)


def test_a_restored_sequence_rewinds_only_to_where_it_was_restored(runners: Any) -> None:
    runner = runners("reference", "native")
    runner.rewind(0, 0)
    ids = some_tokens(140)
    feed(runner, 0, ids)
    ending = snapshot.save_ending(runner, 0, 0, 140)
    snapshot.restore_ending(runner, 1, 0, 140, ending)
    assert runner.can_rewind(1, 140)
    assert not runner.can_rewind(1, 139)
    feed(runner, 1, ids[:60])
    assert runner.can_rewind(1, 140)
    assert not runner.can_rewind(1, 139)
    feed(runner, 1, ids[:60])
    assert runner.can_rewind(1, 260 - CHUNK)
    assert not runner.can_rewind(1, 259 - CHUNK)
