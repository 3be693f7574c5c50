"""What a sequence leaves behind: the rows that its continuation reads, as bytes on the host.

Compressed rows of whole pages (128 tokens; no block is open at a page's end) belong to the tokens
alone, so sequences that begin alike share them. The rest is small and belongs to one length: the
ring of recent rows, the projected rows of blocks still open (at ratio 4 also of the block before,
which the next one looks back to), and the entries of the page that is not full (spec 4.4).
"""

import math
from collections.abc import Iterator
from typing import Any

from ..backend import Backend, Host, RowRange
from ..cache import stream_rows
from ..config_fields import CSA_RATIO
from ..runner import Runner


def page_size(runner: Runner) -> int:
    """Tokens after which every layer's blocks end together: 128, if no ratio says otherwise."""
    return math.lcm(128, *(ratio for ratio in runner.cfg.compress_ratios if ratio))


def save_pages(runner: Runner, slot: int, start: int, stop: int) -> Host:
    """Compressed rows of the positions `start` to `stop`, whole pages: uint8 (n,)."""
    return runner.be.save(slot, list(_entries(runner, start, stop)))


def restore_pages(runner: Runner, slot: int, start: int, stop: int, data: Host) -> None:
    if runner.led is not None:
        runner.led.change("restore_pages", (slot, start, stop), data)
    runner.be.restore(slot, list(_entries(runner, start, stop)), data)


def save_ending(runner: Runner, slot: int, page: int, length: int) -> Host:
    """What `length` tokens leave besides the compressed rows before `page`, a page's start."""
    return runner.be.save(slot, list(_ending(runner, page, length)))


def restore_ending(runner: Runner, slot: int, page: int, length: int, data: Host) -> None:
    """The same back; the slot then holds `length` tokens, if its pages were restored."""
    if runner.led is not None:
        runner.led.change("restore_ending", (slot, page, length), data)
    runner.be.restore(slot, list(_ending(runner, page, length)), data)
    runner.adopt(slot, length)


def fork(runner: Runner, source: int, target: int, length: int) -> None:
    """Make `target` hold the first `length` tokens of `source`, which could be rewound to them."""
    if not 0 < length <= runner.lengths[source] or not runner.can_rewind(source, length):
        raise ValueError(f"slot {source} no longer holds what {length} tokens leave")
    if runner.led is not None:
        runner.led.change("copy", (source, target, length))
    copy(runner, source, target, length)
    runner.adopt(target, length)


def copy(runner: Runner, source: int, target: int, length: int) -> None:
    """The rows of `length` tokens from slot to slot."""
    be: Backend = runner.be
    be.copy(source, target, list(_ending(runner, 0, length)))


def _entries(runner: Runner, start: int, stop: int) -> Iterator[RowRange]:
    for cache, ratio in zip(runner.cache, runner.cfg.compress_ratios, strict=True):
        for pool in (cache.pool, cache.index_pool):
            if pool is not None and start // ratio < stop // ratio:
                yield RowRange(pool, start // ratio, stop // ratio)


def _ending(runner: Runner, page: int, length: int) -> Iterator[RowRange]:
    chunk = runner.max_chunk
    window = runner.cfg.sliding_window
    for cache, ratio in zip(runner.cache, runner.cfg.compress_ratios, strict=True):
        yield from _recent(cache.window, window + chunk, max(0, length - window), length)
        if ratio:
            before = ratio if ratio == CSA_RATIO else 0
            first = max(0, length // ratio * ratio - before)
            for rows in (cache.rows, cache.index_rows):
                if rows is not None:
                    yield from _recent(rows, 2 * ratio + runner.slack, first, length)
    for cache in runner.drafter.cache if runner.drafter else ():
        yield from _recent(cache.window, window + chunk, max(0, length - window), length)
        if cache.streams is not None:
            yield from _recent(cache.streams, stream_rows(runner.cfg), length - 1, length)
    yield from _entries(runner, page, length)


def _recent(ring: Any, size: int, first: int, end: int) -> Iterator[RowRange]:
    """Positions `first` to `end` of a ring, which may go over its edge."""
    a, b = first % size, (end - 1) % size + 1
    if first == end:
        return
    if a < b:
        yield RowRange(ring, a, b)
    else:
        yield RowRange(ring, a, size)
        yield RowRange(ring, 0, b)
