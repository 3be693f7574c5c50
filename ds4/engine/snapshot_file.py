"""Files of snapshots: a magic number, the length of a JSON header, the header, its xxh3-128, rows.

A file's name is the key of the prefix, a hash; the tokens are in no file. Nothing is trusted
unchecked: what is short, altered or foreign raises ValueError, or is none.
"""

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from ..backend import Host
from .tree import Ending, Segment

MAGIC = b"DS4SNAP1"
PIECE = 1 << 20  # bytes read and checked at once
_HEADER_LIMIT = 1 << 20


def described(part: Segment[Any] | Ending[Any], nbytes: int, checksum: str) -> dict[str, Any]:
    """What a header says of `nbytes` of rows with that checksum."""
    common = {"bytes": nbytes, "xxh3": checksum}
    if isinstance(part, Ending):
        place = {"base": part.base.hex(), "pages": part.pages, "rest": part.rest}
        return {"kind": "ending", "key": part.key.hex(), **place, **common}
    keys = [key.hex() for key in part.keys]
    place = {"parent": part.parent.hex(), "first": part.first, "keys": keys}
    return {"kind": "segment", **place, **common}


def encoded(header: dict[str, Any]) -> bytes:
    """All that stands before the rows."""
    text = json.dumps(header).encode()
    return MAGIC + len(text).to_bytes(4, "little") + text + xxhash.xxh3_128_digest(text)


def read_header(file: IO[bytes]) -> dict[str, Any]:
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


def read_data(file: FileIO, nbytes: int) -> tuple[Host, str]:
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


def opened(path: Path) -> Segment[Path] | Ending[Path] | None:
    """What a file holds, by its header; None if it cannot be used."""
    try:
        with path.open("rb") as file:
            header = read_header(file)
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


def placed(
    part: Segment[Any] | Ending[Any], path: Path, nbytes: int
) -> Segment[Path] | Ending[Path]:
    """The same with its file instead of its rows."""
    if isinstance(part, Ending):
        return Ending(part.key, part.base, part.pages, part.rest, nbytes, path)
    return Segment(part.parent, part.first, part.keys, nbytes, path)


def write_file(path: Path, header: bytes, data: Host) -> None:
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


def aged(files: Iterable[Path]) -> list[tuple[float, int, Path]]:
    """Regular files with their time and size, oldest first; another process may remove some."""
    found = []
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            about = file.stat()
            if stat.S_ISREG(about.st_mode):
                found.append((about.st_mtime, about.st_size, file))
    return sorted(found)
