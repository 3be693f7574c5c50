"""The prefix cache: what was computed for a prompt's beginning is not computed again.

Snapshots lie in host memory, and where there is a folder also on disk. The caller keeps a slot when
it stands at a length worth coming back to (`stops` says which; the end of a turn is another), and
resumes a slot before it absorbs a prompt.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .. import __version__
from ..backend import Host
from ..runner import Runner
from . import snapshot
from .store import Store
from .tree import Ending, Key, Segment, Tree, ending_key, page_keys

SEGMENT_PAGES = 64  # 29 MB of the real model's rows: what is written, read and freed at once
READERS = 8  # threads that read and check files
LAYOUT = 1  # changes with the order or the form of saved rows


@dataclass(frozen=True)
class Hit:
    """A known prefix of a prompt: its first `length` tokens."""

    length: int
    where: Literal["memory", "disk"]
    ending: Ending[Any]


class PrefixCache:
    """Snapshots of a runner's sequences, `memory_bytes` in memory and `disk_bytes` in a folder.

    `counts` has hits_memory, hits_disk, misses, reused_tokens, kept, evicted, and for the disk
    written, corrupt and skipped. Not for several threads.
    """

    def __init__(
        self,
        runner: Runner,
        memory_bytes: int,
        folder: str | os.PathLike[str] | None = None,
        disk_bytes: int = 0,
    ) -> None:
        self.page = snapshot.page_size(runner)
        root = fingerprint(runner)
        self._tree: Tree[Host] = Tree(root, self.page, memory_bytes)
        self._counts: Counter[str] = Counter()
        self._store: Store | None = None
        if folder is not None and disk_bytes > 0:
            if runner.identity is None:
                raise ValueError("snapshots on disk need a runner that knows its weights' identity")
            self._store = Store(Path(folder), root, self.page, disk_bytes)

    @property
    def bytes(self) -> int:
        """Of snapshots in memory."""
        return self._tree.nbytes

    @property
    def disk_bytes(self) -> int:
        """Of snapshots on disk."""
        return self._store.tree.nbytes if self._store else 0

    @property
    def counts(self) -> Counter[str]:
        return self._counts + self._store.counts if self._store else +self._counts

    def find(self, tokens: Sequence[int]) -> Hit | None:
        """The longest known prefix of `tokens` that leaves at least one of them to be run."""
        keys = page_keys(self._tree.root, tokens, self.page)
        near = self._tree.longest(keys, tokens)
        far = self._store.longest(keys, tokens) if self._store else None
        if far and (near is None or self._length(far) > self._length(near)):
            return Hit(self._length(far), "disk", far)
        return Hit(self._length(near), "memory", near) if near else None

    def restore(self, hit: Hit, runner: Runner, slot: int) -> bool:
        """Put a hit into a slot, which then holds hit.length tokens.

        False, and the slot is empty, if what was on disk is damaged or does not fit this context.
        """
        runner.rewind(slot, 0)
        where = self._tree if hit.where == "memory" else self._store
        if where is None or hit.ending.key not in where:  # evicted since it was found
            return False
        known, missing = self._segments(hit)
        needed: list[Segment[Any]] = [*known, *missing]
        if max(map(_stop, needed), default=0) * self.page > runner.context:
            return False
        for here in known:
            self._restore(runner, slot, here, here.payload)
        rows: Host | None = hit.ending.payload
        if hit.where == "disk":
            reading, read = self._read([*missing, hit.ending]), list[Segment[Host]]()
            for segment in missing:  # one goes to the device while others are read
                if (part := next(reading)) is None:
                    return False
                self._restore(runner, slot, segment, part)
                place = segment.parent, segment.first, segment.keys
                read.append(Segment(*place, part.nbytes, part))
            rows = next(reading)
        if rows is None:
            return False
        snapshot.restore_ending(runner, slot, hit.ending.pages * self.page, hit.length, rows)
        if hit.where == "disk":
            self._have_read(hit.ending, read, rows)
        else:
            self._tree.touch(hit.ending)
        self._counts[f"hits_{hit.where}"] += 1
        self._counts["reused_tokens"] += hit.length
        return True

    def resume(self, runner: Runner, slot: int, tokens: Sequence[int]) -> int:
        """Find and restore: how many of `tokens` the slot then holds, 0 if none are known."""
        hit = self.find(tokens)
        while hit and not self.restore(hit, runner, slot):
            again = self.find(tokens)
            hit = None if again == hit else again
        if hit:
            return hit.length
        self._counts["misses"] += 1
        runner.rewind(slot, 0)
        return 0

    def stops(self, tokens: Sequence[int], start: int) -> list[int]:
        """Lengths beyond `start` at which a prompt's slot is worth keeping while it is absorbed.

        Where it leaves what is known, as another may leave it there too, and at its last whole
        page: a snapshot is smallest there, and the next turn may differ from the end on.
        """
        keys = page_keys(self._tree.root, tokens[:-1], self.page)
        known = self._tree.known(keys)
        stops = {pages * self.page for pages in (known, len(keys) - 1)}
        return sorted(stop for stop in stops if stop > start)

    def keep(self, runner: Runner, slot: int, tokens: Sequence[int]) -> None:
        """Remember a slot that holds exactly `tokens`; written to disk in the background."""
        if not tokens or runner.lengths[slot] != len(tokens):
            held = runner.lengths[slot]
            raise ValueError(f"slot {slot} holds {held} tokens, not the {len(tokens)} given")
        keys = page_keys(self._tree.root, tokens, self.page)
        pages, rest = len(keys) - 1, tokens[(len(keys) - 1) * self.page :]
        key = ending_key(keys[-1], rest)
        if key in self._tree:
            self._tree.touch(self._tree[key])
            return
        segments: list[Segment[Host]] = []
        for first in range(self._tree.known(keys), pages, SEGMENT_PAGES):
            some = tuple(keys[first + 1 : first + 1 + SEGMENT_PAGES])
            bounds = first * self.page, (first + len(some)) * self.page
            rows = snapshot.save_pages(runner, slot, *bounds)
            segments.append(Segment(keys[first], first, some, rows.nbytes, rows))
        rows = snapshot.save_ending(runner, slot, pages * self.page, len(tokens))
        ending = Ending(key, keys[-1], pages, len(rest), rows.nbytes, rows)
        for segment in segments:  # all or, if memory did not suffice, none
            self._tree.add_segment(segment)
        self._tree.add_ending(ending)
        self._counts["kept"] += 1
        if self._store:
            self._write(self._store, ending)
        self._evict()

    def flush(self) -> None:
        """Wait until what was kept is on disk."""
        if self._store:
            self._store.flush()

    def close(self) -> None:
        """Write what waits to be written."""
        if self._store:
            self._store.close()

    def _length(self, ending: Ending[Any]) -> int:
        return ending.pages * self.page + ending.rest

    def _segments(self, hit: Hit) -> tuple[list[Segment[Host]], list[Segment[Path]]]:
        """What a prefix is made of: in memory, and then on disk only."""
        known: list[Segment[Host]] = []
        missing: list[Segment[Path]] = []
        if hit.where == "memory":
            return self._rows(hit.ending.base), missing
        assert self._store is not None
        for segment, used in self._store.path(hit.ending):
            last = segment.keys[used - 1]
            if self._tree.has_page(last):
                known, missing = self._rows(last), []
            else:
                missing.append(segment)
        return known, missing

    def _rows(self, base: Key) -> list[Segment[Host]]:
        return [segment for segment, _ in self._tree.path(base)]

    def _restore(self, runner: Runner, slot: int, segment: Segment[Any], rows: Host) -> None:
        start, count = segment.first * self.page, len(segment.keys) * self.page
        snapshot.restore_pages(runner, slot, start, start + count, rows)

    def _read(self, parts: Sequence[Segment[Path] | Ending[Path]]) -> Iterator[Host | None]:
        """Their bytes from disk, in this order; None for what is damaged or gone."""
        assert self._store is not None
        with ThreadPoolExecutor(READERS) as readers:
            yield from readers.map(self._store.read, parts)

    def _have_read(self, ending: Ending[Path], read: list[Segment[Host]], rows: Host) -> None:
        """What was on disk is in memory from now on, too."""
        assert self._store is not None
        for segment in read:
            self._tree.add_segment(segment)
        self._store.touch(ending)
        place = ending.key, ending.base, ending.pages, ending.rest
        self._tree.add_ending(Ending(*place, rows.nbytes, rows))
        self._evict()

    def _write(self, store: Store, ending: Ending[Host]) -> None:
        """Hand over what is not on disk, in order."""
        path = self._tree.path(ending.base)
        missing = [s for s, used in path if not store.has_page(s.keys[used - 1])]
        store.write([*missing, ending])

    def _evict(self) -> None:
        self._counts["evicted"] += sum(isinstance(part, Ending) for part in self._tree.evict())


def _stop(segment: Segment[Any]) -> int:
    """One past its last page."""
    return segment.first + len(segment.keys)


def fingerprint(runner: Runner) -> bytes:
    """Of all that decides a row's bytes: model, weights, backend, cache mode, version."""
    be = runner.be
    said = {
        "layout": LAYOUT,
        "version": __version__,
        "backend": [be.name, be.device.split(":")[0], be.cache],
        "config": asdict(runner.cfg),
        "drafter": runner.drafter.name if runner.drafter else None,
        "weights": runner.identity() if runner.identity else None,
    }
    text = json.dumps(said, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def default_folder() -> Path:
    """Where snapshots lie if nothing else is said: the user's cache folder."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ds4" / "snapshots"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ds4" / "snapshots"
