"""Snapshots on disk: they survive the process, and nothing in them is trusted unchecked.

A file is a magic number, the length of a JSON header, the header, its xxh3-128, and the bytes of
rows. Its name is the key of the prefix, a hash; the tokens are in no file. Files are written by a
thread of their own: to a temporary name, synced, and renamed. What is short or altered is removed,
and computed again. Each model, backend and version has a folder of its own, named by `root`.
"""

import contextlib
import json
import logging
import os
import queue
import secrets
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from ..backend import Host
from .tree import Ending, Segment, Tree

log = logging.getLogger("ds4")

MAGIC = b"DS4SNAP1"
WAITING = 1 << 30  # bytes that may wait to be written; beyond it snapshots stay in memory only
PIECE = 1 << 20  # bytes read and checked at once
_HEADER_LIMIT = 1 << 20


@dataclass(frozen=True)
class _Job:
    part: Segment[Any] | Ending[Any]
    data: Host


class Store:
    """Snapshots of at most `budget` bytes in a folder. Its methods may be called from any thread.

    `counts` has written, evicted, corrupt and skipped: files, and what was not written in time.
    """

    def __init__(self, folder: Path, root: bytes, page: int, budget: int) -> None:
        self.folder = folder / root.hex()
        self.tree: Tree[Path] = Tree(root, page, budget)
        self.counts: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._waiting = 0  # bytes
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        for private in (folder, self.folder):
            private.chmod(0o700)
        _trim_others(folder, self.folder, budget)
        self._scan()
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
                header = _read_header(file)
                data, checksum = _read_data(file, header["bytes"])
            if header == _header(part, data.nbytes, checksum):
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

    def write(self, part: Segment[Any] | Ending[Any], data: Host) -> None:
        """Write in the background; segments before what hangs on them."""
        with self._lock:
            if self._waiting + data.nbytes > WAITING:
                self.counts["skipped"] += 1
                return
            self._waiting += data.nbytes
        self._jobs.put(_Job(part, data))

    def flush(self) -> None:
        """Wait until all is written."""
        self._jobs.join()

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._write(job)
            except OSError as error:
                self.counts["skipped"] += 1
                log.warning("a snapshot could not be written to %s: %s", self.folder, error)
            finally:
                with self._lock:
                    self._waiting -= job.data.nbytes
                self._jobs.task_done()
        self._jobs.task_done()

    def _write(self, job: _Job) -> None:
        part, data = job.part, job.data
        if isinstance(part, Ending):
            hangs_on, key = part.base, part.key
        else:
            hangs_on, key = part.parent, part.keys[-1]
        with self._lock:
            there = key in self.tree if isinstance(part, Ending) else self.tree.has_page(key)
            if there or not self.tree.has_page(hangs_on):  # what it hangs on was not written
                return
        checksum = xxhash.xxh3_128_hexdigest(data.data)
        path, header = self.folder / key.hex(), _encoded(_header(part, data.nbytes, checksum))
        _write_file(path, header, data)
        with self._lock:
            self._add(_placed(part, path, len(header) + data.nbytes))
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
        for path in sorted(self.folder.iterdir(), key=lambda p: p.stat().st_mtime):
            opened = _opened(path)
            if opened is None:
                self.counts["corrupt"] += 1
                path.unlink(missing_ok=True)
            else:
                found.append(opened)
        segments = sorted((p for p in found if isinstance(p, Segment)), key=lambda p: p.first)
        endings = [p for p in found if isinstance(p, Ending)]
        for segment in segments:
            if self.tree.has_page(segment.parent):
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


def _header(part: Segment[Any] | Ending[Any], nbytes: int, checksum: str) -> dict[str, Any]:
    common = {"bytes": nbytes, "xxh3": checksum}
    if isinstance(part, Ending):
        place = {"base": part.base.hex(), "pages": part.pages, "rest": part.rest}
        return {"kind": "ending", "key": part.key.hex(), **place, **common}
    keys = [key.hex() for key in part.keys]
    place = {"parent": part.parent.hex(), "first": part.first, "keys": keys}
    return {"kind": "segment", **place, **common}


def _encoded(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return MAGIC + len(text).to_bytes(4, "little") + text + xxhash.xxh3_128_digest(text)


def _read_header(file: IO[bytes]) -> dict[str, Any]:
    """The header; data follows. Raises ValueError for what is not a whole snapshot."""
    begin = file.read(len(MAGIC) + 4)
    length = int.from_bytes(begin[len(MAGIC) :], "little")
    if begin[: len(MAGIC)] != MAGIC or not 0 < length < _HEADER_LIMIT:
        raise ValueError("not a snapshot")
    text, check = file.read(length), file.read(16)
    if xxhash.xxh3_128_digest(text) != check:
        raise ValueError("its header was altered")
    header: dict[str, Any] = json.loads(text)
    if os.fstat(file.fileno()).st_size != file.tell() + header["bytes"]:
        raise ValueError("it is short")
    return header


def _read_data(file: FileIO, nbytes: int) -> tuple[Host, str]:
    """The data and its checksum, taken of each piece while it is in the processor's cache."""
    data, checksum = np.empty(nbytes, np.uint8), xxhash.xxh3_128()
    at, whole = 0, data.data
    while at < nbytes:
        count = file.readinto(whole[at : at + PIECE])
        if not count:
            raise ValueError("it is short")
        checksum.update(whole[at : at + count])
        at += count
    return data, checksum.hexdigest()


def _opened(path: Path) -> Segment[Path] | Ending[Path] | None:
    """What a file holds, by its header; None if it cannot be used."""
    try:
        with path.open("rb") as file:
            header = _read_header(file)
            nbytes, unhex = file.tell() + header["bytes"], bytes.fromhex
        if header["kind"] == "ending" and header["key"] == path.name:
            place = unhex(header["base"]), header["pages"], header["rest"]
            return Ending(unhex(header["key"]), *place, nbytes, path)
        keys = tuple(unhex(key) for key in header["keys"])
        if header["kind"] == "segment" and keys[-1].hex() == path.name:
            return Segment(unhex(header["parent"]), header["first"], keys, nbytes, path)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _placed(
    part: Segment[Any] | Ending[Any], path: Path, nbytes: int
) -> Segment[Path] | Ending[Path]:
    if isinstance(part, Ending):
        return Ending(part.key, part.base, part.pages, part.rest, nbytes, path)
    return Segment(part.parent, part.first, part.keys, nbytes, path)


def _write_file(path: Path, header: bytes, data: Host) -> None:
    """All of it under its name, or nothing."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(header)
            file.write(data.data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _trim_others(folder: Path, mine: Path, budget: int) -> None:
    """Remove snapshots of other models and versions, oldest first, beyond the budget in all."""
    files = [file for file in folder.glob("*/*") if file.is_file() and file.parent != mine]
    aged = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in files)
    total = sum(size for _, size, _ in aged)
    for _, size, file in aged:
        if total <= budget:
            break
        file.unlink(missing_ok=True)
        total -= size
