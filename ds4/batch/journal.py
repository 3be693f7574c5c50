"""The output file: whole lines are appended and synced, so that a kill loses none that was told.

A line that a kill cut short is removed at the next start, and its request is run again.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .lines import BatchError, Job, succeeded

try:
    import fcntl
except ImportError:  # Windows: two runs at once are not noticed
    fcntl = None  # type: ignore[assignment]

_PIECE = 1 << 20


class Journal:
    """OUT.jsonl, opened to go on. `done` are the ids of answered requests; `failed` had no 200.

    Raises BatchError if it cannot be written, or holds answers to other requests.
    """

    def __init__(self, path: Path, jobs: Sequence[Job]) -> None:
        self.path = path
        try:
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
            try:
                self._lock()
                self._file.truncate(self._whole_end())
                self.done, self.failed = self._read({job.id for job in jobs})
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise BatchError(f"{path}: cannot be written: {error.strerror}") from error

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write answers and wait until they are on the disk."""
        data = b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise BatchError(f"{self.path}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BatchError(f"{self.path}: another ds4 batch is writing it") from error

    def _whole_end(self) -> int:
        """Where the last complete line ends."""
        end = self._file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _PIECE)
            self._file.seek(start)
            at = self._file.read(end - start).rfind(b"\n")
            if at >= 0:
                return start + at + 1
            end = start
        return 0

    def _read(self, ids: set[str]) -> tuple[set[str], int]:
        done: set[str] = set()
        failed = 0
        with open(self.path, "rb") as file:
            for number, raw in enumerate(file, 1):
                line = _parsed(raw)
                if line.get("id") not in ids:
                    raise BatchError(
                        f"{self.path}: line {number} is no answer to a line of the input; "
                        "name another output file, or remove this one"
                    )
                done.add(line["id"])
                failed += not succeeded(line)
        return done, failed


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        line = json.loads(raw)
    except ValueError:
        return {}
    return line if isinstance(line, dict) else {}
