"""Safetensors files on disk: which belong to a checkpoint, and where each tensor's bytes lie.

A file is: header length (8 bytes, little endian), JSON header, tensors back to back. Headers come
from strangers, so every number in them is checked before it is used. Pickle files are never opened.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import CheckpointError
from ..json_fields import AGAIN, need_regular

INDEX = "model.safetensors.index.json"

_HEADER_LIMIT = 100_000_000  # the limit of the safetensors library
_PIECE = 1 << 28  # macOS refuses to read 2 GiB at once
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file, or a run of rows of it."""

    path: Path
    name: str  # as in the file
    dtype: str  # as in the file: "BF16", "F8_E4M3" ...
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int

    def __str__(self) -> str:
        return f"{self.path}: {self.name}"

    def part(self, index: int, parts: int, shape: tuple[int, ...]) -> "Stored":
        """The index-th of `parts` equal runs of bytes, as a tensor of this shape."""
        size = self.nbytes // parts
        return Stored(self.path, self.name, self.dtype, shape, self.offset + index * size, size)

    def run(self, start: int, nbytes: int) -> "Stored":
        """Some of its bytes."""
        return Stored(self.path, self.name, "U8", (nbytes,), self.offset + start, nbytes)

    def read_into(self, array: Any) -> None:
        """Fill a contiguous NumPy array of exactly nbytes."""
        view = memoryview(array).cast("B")
        if view.nbytes != self.nbytes:
            raise ValueError(f"{self}: {self.nbytes} bytes do not fill {view.nbytes}")
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                for start in range(0, self.nbytes, _PIECE):
                    _read_piece(file, view[start : start + _PIECE])
        except (OSError, EOFError) as error:
            raise CheckpointError(f"{self}: cannot be read: {error}; {AGAIN}") from None


def _read_piece(file: Any, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise EOFError("the file ended early")
        done += count


# which files


def open_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder, under the name it has in its file."""
    index = folder / INDEX
    try:
        table = _read_index(index) if index.exists() else {}
        paths = _listed_files(folder, table) if table else _find_files(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from None
    tensors: dict[str, Stored] = {}
    for path in paths:
        for name, stored in read_header(path).items():
            if name in tensors:
                other = tensors[name].path.name
                raise CheckpointError(f"{stored}: is also in {other}; remove one of the files")
            tensors[name] = stored
    for name, file in table.items():
        if name not in tensors or tensors[name].path.name != file:
            raise CheckpointError(
                f"{index}: says that {short(name)} is in {file}, but it is not; download both again"
            )
    return tensors


def _listed_files(folder: Path, table: dict[str, str]) -> list[Path]:
    paths = [folder / name for name in sorted(set(table.values()))]
    for path in paths:
        if not path.exists():
            raise CheckpointError(
                f"{folder / INDEX}: names {path.name}, which is missing; download {path}"
            )
    return paths


def _find_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder")
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]}: is a pickle file, refused because opening one can run any "
            "program hidden in it; download or convert the checkpoint as *.safetensors"
        )
    raise CheckpointError(f"{folder}: holds no *.safetensors file; download the checkpoint again")


def _read_index(path: Path) -> dict[str, str]:
    """model.safetensors.index.json -> tensor name -> file name, safe to join to the folder."""
    index = _parse_json(path, _read_bytes(path))
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{path}: weight_map should map tensor names to files; {AGAIN}")
    for name, file in table.items():
        if not isinstance(file, str) or not _plain_file_name(file):
            raise CheckpointError(
                f"{path}: weight_map says that {short(name)} is in {short(file)}; it should be a "
                "*.safetensors file of the same folder; get the index from a source you trust"
            )
    return table


def _plain_file_name(file: str) -> bool:
    parts = PurePosixPath(file).name, PureWindowsPath(file).name
    return parts == (file, file) and file.endswith(".safetensors") and "\0" not in file


def _read_bytes(path: Path) -> bytes:
    need_regular(path, CheckpointError, AGAIN)
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


# one header


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file, after checking that they fill it exactly."""
    try:
        need_regular(path, CheckpointError, AGAIN)
        with path.open("rb") as file:
            size = path.stat().st_size
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path}: is truncated or no safetensors file: header length says {length} "
                    f"bytes, the file has {size}; {AGAIN}"
                )
            if length > _HEADER_LIMIT:
                raise CheckpointError(f"{path}: header length {length} is over the limit; {AGAIN}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    header = _parse_json(path, text)
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object; {AGAIN}")
    header.pop("__metadata__", None)
    tensors = {n: _entry(path, n, entry, 8 + length) for n, entry in header.items()}
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def _entry(path: Path, name: str, entry: Any, start: int) -> Stored:
    where = f"{path}: {short(name)}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: its header entry is not an object; {AGAIN}")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where}: dtype {short(dtype)} is unknown; {AGAIN}")
    if not _naturals(shape):
        raise CheckpointError(f"{where}: shape {short(shape)} is not a list of sizes; {AGAIN}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {short(offsets)} are not a range; {AGAIN}")
    bits, nbytes = math.prod(shape) * _BITS[dtype], offsets[1] - offsets[0]
    if bits != nbytes * 8:
        raise CheckpointError(
            f"{where}: data_offsets span {nbytes} bytes, but {dtype} {shape} takes "
            f"{bits / 8:.15g}; {AGAIN}"
        )
    return Stored(path, name, dtype, tuple(shape), start + offsets[0], nbytes)


def _check_layout(path: Path, tensors: dict[str, Stored], start: int, size: int) -> None:
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            problem = "overlaps" if tensor.offset < end else "leaves a gap after"
            raise CheckpointError(
                f"{path}: {short(tensor.name)}: data_offsets {problem} the tensor before; {AGAIN}"
            )
        end += tensor.nbytes
    if end > size:
        raise CheckpointError(
            f"{path}: is truncated: {size} bytes, but its header needs {end}; {AGAIN}"
        )
    if end < size:
        raise CheckpointError(f"{path}: has {size - end} bytes after its last tensor; {AGAIN}")


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _parse_json(path: Path, text: bytes) -> Any:
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(path, pairs)
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}; {AGAIN}") from None


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise CheckpointError(f"{path}: names {short(name)} twice; {AGAIN}")
        table[name] = value
    return table


def short(value: Any) -> str:
    """A name or value from a file, for a one-line message."""
    text = value if isinstance(value, str) else repr(value)
    return ascii(text if len(text) <= 100 else text[:97] + "...")[1:-1]
