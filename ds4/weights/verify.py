"""Is a checkpoint folder what it should be: its structure, and with `full` its every byte.

Checksums come from manifest.json, which `ds4 quantize` writes: {"format": 1, "tensors": {name:
{"xxh3_128": hex of the stored bytes}}}. A folder of the hub's cache has checksums in the names of
its blobs: SHA-256 of large files, git's SHA-1 of small ones. Where there are neither, every value
is read and must be one that can be run.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import xxhash

from ..config import Config
from ..errors import CheckpointError, ConfigError
from ..folder import TOKENIZER, sampling_defaults, words
from ..json_fields import AGAIN, need_regular, read_json
from .checkpoint import Checkpoint
from .load import load_drafter, load_weights
from .shards import Stored, open_folder, read_header, short
from .tensor import HostTensor

MANIFEST = "manifest.json"
_PIECE = 1 << 23  # bytes read at a time

Progress = Callable[[int, int], None]


@dataclass
class Report:
    """What was checked and what was wrong: one line each, with file, tensor and remedy."""

    folder: Path
    files: int = 0
    tensors: int = 0
    nbytes: int = 0
    checksums: str | None = None  # "manifest", "hub" or None, where none were checked
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what not every use of the model can do without

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(folder: str | Path, full: bool = False, progress: Progress | None = None) -> Report:
    """Check a folder; `progress` is called with bytes done and bytes in all.

    Finds what it can in one go, but looks at bytes only where headers are sound.
    """
    report = Report(Path(folder))
    cfg = _structure(report)
    if cfg is None:
        return report
    try:
        table = _read_manifest(report.folder / MANIFEST)
        tensors = open_folder(report.folder)
    except CheckpointError as error:
        report.problems.append(str(error))
        return report
    if table is not None:
        report.problems += _unlisted(report.folder, table, tensors)
    if full:
        _every_byte(report, cfg, table, tensors, progress)
    return report


# structure


def _structure(report: Report) -> Config | None:
    """Check headers, config.json, and that they describe one model; None if they do not."""
    for path in sorted(report.folder.glob("*.safetensors")):
        try:
            tensors = read_header(path)
        except CheckpointError as error:
            report.problems.append(str(error))
            continue
        report.files += 1
        report.tensors += len(tensors)
        report.nbytes += sum(stored.nbytes for stored in tensors.values())
    cfg = None
    try:
        cfg = Config.from_file(report.folder / "config.json")
        if not report.problems:
            Checkpoint(report.folder).check_all(cfg)
    except (ConfigError, CheckpointError) as error:
        report.problems.append(str(error))
    _beside_weights(report)
    return None if report.problems else cfg


def _beside_weights(report: Report) -> None:
    """Words and sampling options, by the checks that loading makes."""
    for check in (words, sampling_defaults):
        try:
            check(report.folder)
        except (ConfigError, CheckpointError) as error:
            report.problems.append(str(error))
    if not (file := report.folder / TOKENIZER).exists():
        report.notes.append(f"{file} is missing: the model takes token ids only, from Python")


def _read_manifest(path: Path) -> dict[str, str] | None:
    """Tensor name -> hex digest; None if there is no manifest."""
    if not path.exists():
        return None
    need_regular(path, CheckpointError, AGAIN)
    content = read_json(path, CheckpointError, AGAIN)
    if not isinstance(content, dict) or content.get("format") != 1:
        raise CheckpointError(f"{path}: format should be 1; a newer ds4 may know this one")
    entries: Any = content.get("tensors")
    if not isinstance(entries, dict) or not all(map(_digest, entries.values())):
        raise CheckpointError(
            f'{path}: tensors should map names to {{"xxh3_128": 32 hex digits}}; {AGAIN}'
        )
    return {name: _digest(entry) for name, entry in entries.items()}


def _digest(entry: Any) -> str:
    digest = entry.get("xxh3_128") if isinstance(entry, dict) else None
    if isinstance(digest, str) and re.fullmatch(r"[0-9a-fA-F]{32}", digest):
        return digest.lower()
    return ""


def _unlisted(folder: Path, table: dict[str, str], tensors: dict[str, Stored]) -> Iterator[str]:
    for name in sorted(table.keys() - tensors.keys()):
        yield f"{folder / MANIFEST}: lists {short(name)}, which is in no file; {AGAIN}"
    for name in sorted(tensors.keys() - table.keys()):
        yield f"{tensors[name]}: is not listed in {MANIFEST}; {AGAIN}"


# every byte


def _every_byte(
    report: Report,
    cfg: Config,
    table: dict[str, str] | None,
    tensors: dict[str, Stored],
    progress: Progress | None,
) -> None:
    sums = {path: _blob_sum(path) for path in report.folder.rglob("*") if path.is_file()}
    try:
        if table is not None:
            report.checksums = "manifest"
            report.problems += _wrong_tensors(table, tensors, progress)
        elif all(sums.get(stored.path) for stored in tensors.values()):
            report.checksums = "hub"
            report.problems += _wrong_files(sums, progress)
        else:
            checkpoint = Checkpoint(report.folder)
            load_weights(_Nothing(), cfg, checkpoint, progress)
            if checkpoint.drafter is not None:
                load_drafter(_Nothing(), cfg, checkpoint, progress)
    except CheckpointError as error:
        report.problems.append(str(error))


class _Sum(Protocol):
    def update(self, data: bytes, /) -> None: ...


class _Nothing:
    """A backend that keeps no weight: what is left of loading is the checks."""

    def load(self, name: str, tensor: HostTensor) -> None:
        return None


class _Counter:
    """Feeds files to checksums and tells how far it came."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def feed(self, into: _Sum, path: Path, start: int, nbytes: int) -> None:
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                left = nbytes
                while left:
                    piece = file.read(min(left, _PIECE))
                    if not piece:
                        raise CheckpointError(f"{path}: ended early; {AGAIN}")
                    into.update(piece)
                    left -= len(piece)
                    self.done += len(piece)
                    if self.progress is not None:
                        self.progress(self.done, self.total)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}; {AGAIN}") from None


def _wrong_tensors(
    table: dict[str, str], tensors: dict[str, Stored], progress: Progress | None
) -> Iterator[str]:
    """A line for each tensor whose bytes are not those that the manifest lists."""
    listed = [stored for name, stored in tensors.items() if name in table]
    counter = _Counter(sum(stored.nbytes for stored in listed), progress)
    owner = {digest: name for name, digest in table.items()}
    for stored in sorted(listed, key=lambda one: (one.path, one.offset)):
        found = xxhash.xxh3_128()
        counter.feed(found, stored.path, stored.offset, stored.nbytes)
        digest = found.hexdigest()
        if digest == table[stored.name]:
            continue
        other = owner.get(digest)
        what = "damaged" if other is None else f"swapped: its bytes are those of {short(other)}"
        yield (
            f"{stored}: is {what}; xxh3_128 is {digest}, "
            f"{MANIFEST} says {table[stored.name]}; {AGAIN}"
        )


def _blob_sum(path: Path) -> str:
    """The checksum in the name of a file of the hub's cache; empty for other files."""
    blob = path.resolve()
    known = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", blob.name)
    return blob.name if known else ""


def _wrong_files(sums: dict[Path, str], progress: Progress | None) -> Iterator[str]:
    sizes = {path: path.stat().st_size for path, want in sums.items() if want}
    counter = _Counter(sum(sizes.values()), progress)
    for path, size in sorted(sizes.items()):
        small = len(sums[path]) == 40
        found = hashlib.sha1(b"blob %d\0" % size) if small else hashlib.sha256()
        counter.feed(found, path, 0, size)
        if found.hexdigest() != sums[path]:
            kind = "sha1" if small else "sha256"
            yield (
                f"{path}: is damaged: {kind} is {found.hexdigest()}, the hub says {sums[path]}; "
                f"remove {path.resolve()} and {AGAIN}"
            )
