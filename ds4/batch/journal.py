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
                self.done, self.failed = set[str](), 0
                self._read({job.id for job in jobs})
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise BatchError(f"{path}: cannot be written: {error.strerror}") from error

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write answers and wait until they are on the disk."""
        data = b"".join(map(_written, lines))
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

    def _read(self, ids: set[str]) -> None:
        """Check all lines, and only then remove what a kill left of one: a file of something else
        stays as it is."""
        end = 0
        with open(self.path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    if not end and not _begins(raw, ids):
                        raise self._foreign(number)
                    self._file.truncate(end)
                    return
                line = _parsed(raw)
                if line.get("id") not in ids:
                    raise self._foreign(number)
                end += len(raw)
                self.done.add(line["id"])
                self.failed += not succeeded(line)

    def _foreign(self, number: int) -> BatchError:
        return BatchError(
            f"{self.path}: line {number} is no answer to a line of the input; "
            "name another output file, or remove this one"
        )


def _written(line: dict[str, Any]) -> bytes:
    """Half a surrogate pair, which UTF-8 has no bytes for, as JSON's escape."""
    return json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _begins(raw: bytes, ids: Iterable[str]) -> bool:
    """Whether this is how an answer to one of these begins."""
    starts = (b'{"id": "%b"' % name.encode() for name in ids)
    return any(raw.startswith(start) or start.startswith(raw) for start in starts)


def _parsed(raw: bytes) -> dict[str, Any]:
    """{} for what is no line of ours."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return line if isinstance(line, dict) and isinstance(line.get("id"), str) else {}
