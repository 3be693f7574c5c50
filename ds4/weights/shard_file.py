"""Writing one safetensors file piece by piece, with a checksum of each tensor in its header.

A file appears under its name when it is complete and on the disk: what a killed run leaves is
either whole or a temporary that the next run removes.
"""

import errno
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from ..errors import CheckpointError
from .shards import read_header
from .tensor import Array

TEMPORARY = ".part"
_SIZES = {"I64": 8, "I32": 4, "U32": 4, "F32": 4, "BF16": 2, "F16": 2, "U8": 1}
_PIECE = 1 << 26
_KEY = "ds4"  # in the header's __metadata__


@dataclass(frozen=True)
class Part:
    """One tensor of a file to be."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _SIZES[self.dtype]


class ShardFile:
    """A file of known tensors, each given in pieces from its first byte to its last.

    `about` goes into the header beside the checksums. On leaving its block without an error the
    file is flushed and takes its name. Raises OSError.
    """

    def __init__(self, path: Path, parts: list[Part], about: Mapping[str, Any]) -> None:
        self.path, self.about = path, about
        self.parts = sorted(parts, key=lambda part: -_SIZES[part.dtype])  # so all are aligned
        self._sums = {part.name: xxhash.xxh3_128() for part in self.parts}
        self._at: dict[str, int] = {}
        end = len(self._header())
        for part in self.parts:
            self._at[part.name], end = end, end + part.nbytes
        self._ends = {part.name: self._at[part.name] + part.nbytes for part in self.parts}
        self.nbytes = end

    @property
    def checksums(self) -> dict[str, str]:
        """xxh3-128 of the bytes of each tensor."""
        return {name: digest.hexdigest() for name, digest in self._sums.items()}

    def __enter__(self) -> "ShardFile":
        self._temporary = _beside(self.path)
        try:
            self._file = open(self._temporary, "wb")
        except BaseException:  # Ctrl-C as it opened
            self._temporary.unlink(missing_ok=True)
            raise
        return self

    def append(self, name: str, data: Array) -> None:
        """The next piece of a tensor."""
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        if self._at[name] + len(view) > self._ends[name]:
            raise ValueError(f"{name}: more bytes than its shape takes")
        self._file.seek(self._at[name])
        self._file.write(view)
        self._sums[name].update(view)
        self._at[name] += len(view)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with self._file:
                if kind is None:
                    self._finish()
            if kind is None:
                os.replace(self._temporary, self.path)
                _sync_folder(self.path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._at != self._ends:
            raise ValueError(f"{self.path}: a tensor is not complete")
        self._file.seek(0)
        self._file.write(self._header())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _header(self) -> bytes:
        """Of the same length whatever the checksums are."""
        said = json.dumps({**self.about, "xxh3_128": self.checksums}, sort_keys=True)
        header: dict[str, Any] = {"__metadata__": {"format": "mlx", _KEY: said}}
        end = 0
        for part in self.parts:
            start, end = end, end + part.nbytes
            header[part.name] = {
                "dtype": part.dtype,
                "shape": list(part.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def read_about(path: Path) -> dict[str, Any] | None:
    """What a file's header says beside its tensors; None for a file that is not a ShardFile's."""
    if not path.is_file():  # a pipe would have us wait for a writer
        return None
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return dict(json.loads(header["__metadata__"][_KEY]))
    except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError):
        return None


def damaged(path: Path) -> list[str]:
    """The tensors of a ShardFile's file whose bytes do not have the checksum in its header."""
    about = read_about(path)
    tensors = read_header(path)
    sums = (about or {}).get("xxh3_128")
    if not isinstance(sums, dict) or sums.keys() != tensors.keys():
        raise CheckpointError(f"{path}: has no checksums; quantize it again")
    wrong = []
    for name, stored in tensors.items():
        digest = xxhash.xxh3_128()
        for start in range(0, stored.nbytes, _PIECE):
            piece = np.empty(min(_PIECE, stored.nbytes - start), np.uint8)
            stored.run(start, len(piece)).read_into(piece)
            digest.update(piece.data)
        if digest.hexdigest() != sums[name]:
            wrong.append(name)
    return wrong


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file so that a reader or a crash never sees half of it.

    Of a link the target is written. A pipe, a device and what our own output goes to, such as
    /dev/stdout, are written into. Raises OSError, with `path` as its file.
    """
    with _naming(path):
        into = _not_replaced(path)
        if into is None:
            replace_file(Path(os.path.realpath(path)), content)
            return
        with open(into, "wb", closefd=into is path) as file:
            file.write(content)


def check_writable(path: Path) -> None:
    """Raises what write_whole would, before the long work whose result is to be written."""
    with _naming(path):
        into = _not_replaced(path)
        if into is None:
            temporary = _beside(Path(os.path.realpath(path)))
            temporary.open("wb").close()
            temporary.unlink()
        elif path.is_dir() or not os.access(path, os.W_OK):
            code = errno.EISDIR if path.is_dir() else errno.EACCES
            raise OSError(code, os.strerror(code))


def replace_file(path: Path, content: bytes) -> None:
    """As write_whole, in a folder that is ours: a link or a pipe there is replaced as well."""
    temporary = _beside(path)
    with _naming(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + TEMPORARY)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors name the file that was asked for, not the temporary one beside it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _not_replaced(path: Path) -> Path | int | None:
    """What is opened as it is: no regular file, or a descriptor that leads to the same one."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    for output in 1, 2:
        with suppress(OSError):  # closed
            if os.path.samestat(found, os.fstat(output)):
                return output
    return None if stat.S_ISREG(found.st_mode) else path


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
