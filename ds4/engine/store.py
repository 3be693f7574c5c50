"""Snapshots on disk: they survive the process, and nothing in them is trusted unchecked.

Files (snapshot_file.py) are written by a thread of their own: to a temporary name, synced, and
renamed. What is short or altered is removed, and computed again. Each model, backend and version
has a folder of its own, named by `root`.
"""

import contextlib
import logging
import os
import queue
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import xxhash

from ..backend import Host
from ..errors import ConfigError
from .snapshot_file import (
    aged,
    described,
    encoded,
    opened,
    placed,
    read_data,
    read_header,
    write_file,
)
from .tree import Ending, Segment, Tree

log = logging.getLogger("ds4")

WAITING = 1 << 30  # bytes of several that may wait; beyond it snapshots stay in memory only


class Store:
    """Snapshots of at most `budget` bytes in a folder. Its methods may be called from any thread.

    `counts` has written, evicted, corrupt and skipped: files, and what was not written in time.
    """

    def __init__(self, folder: Path, root: bytes, page: int, budget: int) -> None:
        self.folder = folder / root.hex()
        self.tree: Tree[Path] = Tree(root, page, budget)
        self.counts: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._jobs: queue.Queue[Segment[Host] | Ending[Host] | None] = queue.Queue()
        self._waiting = 0  # bytes
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            for private in (folder, self.folder):
                private.chmod(0o700)
            _trim_others(folder, self.folder, budget)
            self._scan()
        except OSError as error:
            raise ConfigError(
                f"{error.filename or folder}: snapshots cannot be kept here: {error.strerror}; "
                "give another --snapshot-dir"
            ) from error
        self._thread = threading.Thread(target=self._write_all, name="ds4-snapshots", daemon=True)
        self._thread.start()

    # reading

    def longest(self, keys: Sequence[bytes], tokens: Sequence[int]) -> Ending[Path] | None:
        with self._lock:
            return self.tree.longest(keys, tokens)

    def path(self, ending: Ending[Path]) -> list[tuple[Segment[Path], int]]:
        """Its segments, and how many pages of each it needs; none if it is gone."""
        with self._lock:
            return self.tree.path(ending.base) if ending.key in self.tree else []

    def read(self, part: Segment[Path] | Ending[Path]) -> Host | None:
        """The bytes of a file, checked; None, and the file is gone, if they are not as written."""
        try:
            with part.payload.open("rb", buffering=0) as file:
                header = read_header(file)
                data, checksum = read_data(file, header["bytes"])
            if header == described(part, data.nbytes, checksum):
                return data
        except FileNotFoundError:
            return None  # evicted, by this process or another
        except (OSError, ValueError):
            pass
        log.warning("snapshot %s was damaged: removed", part.payload.name)
        with self._lock:
            self.counts["corrupt"] += 1
            part.payload.unlink(missing_ok=True)
            if isinstance(part, Segment):
                self._unlink(self.tree.remove_segment(part))
            elif part.key in self.tree:
                self._unlink(self.tree.remove(part))
        return None

    def touch(self, ending: Ending[Path]) -> None:
        with self._lock, contextlib.suppress(OSError):
            self.tree.touch(ending)
            os.utime(ending.payload)

    # writing

    def __contains__(self, key: bytes) -> bool:
        with self._lock:
            return key in self.tree

    def has_page(self, key: bytes) -> bool:
        with self._lock:
            return self.tree.has_page(key)

    def write(self, parts: Sequence[Segment[Host] | Ending[Host]]) -> None:
        """Write an ending in the background, after segments that it hangs on; all or nothing."""
        nbytes = sum(part.payload.nbytes for part in parts)
        with self._lock:
            if self._waiting and self._waiting + nbytes > WAITING:
                self.counts["skipped"] += len(parts)
                return
            self._waiting += nbytes
        for part in parts:
            self._jobs.put(part)

    def flush(self) -> None:
        """Wait until all is written."""
        self._jobs.join()

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        while (part := self._jobs.get()) is not None:
            try:
                self._write(part)
            except Exception as error:  # no disk, or a bug: what is not written is computed again
                self.counts["skipped"] += 1
                log.warning("a snapshot could not be written to %s: %s", self.folder, error)
            finally:
                with self._lock:
                    self._waiting -= part.payload.nbytes
                    if isinstance(part, Ending) and part.key not in self.tree:
                        self._drop_idle()
                self._jobs.task_done()
        self._jobs.task_done()

    def _drop_idle(self) -> None:
        """Remove segments whose ending could not be written: nothing would ever evict them."""
        with contextlib.suppress(OSError):
            self._unlink(self.tree.prune())

    def _write(self, part: Segment[Host] | Ending[Host]) -> None:
        data = part.payload
        if isinstance(part, Ending):
            hangs_on, key = part.base, part.key
        else:
            hangs_on, key = part.parent, part.keys[-1]
        with self._lock:
            there = key in self.tree if isinstance(part, Ending) else self.tree.has_page(key)
            if there or not self.tree.has_page(hangs_on):  # what it hangs on was not written
                return
        checksum = xxhash.xxh3_128_hexdigest(data.data)
        path, header = self.folder / key.hex(), encoded(described(part, data.nbytes, checksum))
        write_file(path, header, data)
        with self._lock:
            if not self.tree.has_page(hangs_on):  # found damaged meanwhile
                path.unlink(missing_ok=True)
                return
            self._add(placed(part, path, len(header) + data.nbytes))
            self.counts["written"] += 1
            self._unlink(self.tree.evict())

    def _add(self, part: Segment[Path] | Ending[Path]) -> None:
        if isinstance(part, Ending):
            self.tree.add_ending(part)
        else:
            self.tree.add_segment(part)

    def _unlink(self, gone: Sequence[Segment[Path] | Ending[Path]]) -> None:
        for part in gone:
            part.payload.unlink(missing_ok=True)
            self.counts["evicted"] += isinstance(part, Ending)

    # opening

    def _scan(self) -> None:
        """Find what is there, oldest first; remove what cannot be used."""
        found: list[Segment[Path] | Ending[Path]] = []
        for _, _, path in aged(self.folder.iterdir()):
            part = opened(path)
            if part is None:
                self.counts["corrupt"] += 1
                path.unlink(missing_ok=True)
            else:
                found.append(part)
        segments = sorted((p for p in found if isinstance(p, Segment)), key=lambda p: p.first)
        endings = [p for p in found if isinstance(p, Ending)]
        for segment in segments:
            known = self.tree.has_page(segment.keys[-1])  # another one has all of its pages
            if self.tree.has_page(segment.parent) and not known:
                self.tree.add_segment(segment)
            else:
                segment.payload.unlink(missing_ok=True)
        for ending in endings:
            if self.tree.has_page(ending.base):
                self.tree.add_ending(ending)
            else:
                ending.payload.unlink(missing_ok=True)
        self._unlink(self.tree.prune())
        self._unlink(self.tree.evict())


def _trim_others(folder: Path, mine: Path, budget: int) -> None:
    """Remove snapshots of other models and versions, oldest first, beyond the budget in all."""
    files = aged(file for file in folder.glob("*/*") if file.parent != mine)
    total = sum(size for _, size, _ in files)
    for _, size, file in files:
        if total <= budget:
            break
        file.unlink(missing_ok=True)
        total -= size
