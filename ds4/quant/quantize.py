"""A checkpoint in a recipe's formats, made layer by layer from an official one.

A run that was killed is taken up where it stopped, with the same bytes in the end: finished files
are known by the settings and checksums in their headers. config.json comes last, so that nothing
loads a half-made folder.
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..config import Config
from ..errors import CheckpointError, QuantizeError
from ..weights.checkpoint import Checkpoint
from ..weights.shard_file import TEMPORARY, ShardFile, damaged, read_about, write_whole
from ..weights.shards import INDEX, read_header
from ..weights.tensor import Array, HostTensor
from .convert import METHODS, Method, convert
from .formats import FP8_BLOCK
from .recipes import RECIPES
from .targets import Target, describe, plan

Progress = Callable[[int, int], None]
Importance = Mapping[str, Array]

MANIFEST = "manifest.json"
_KEPT = (
    "tokenizer*",
    "special_tokens_map.json",
    "*_config.json",
    "*.jinja",
    "LICENSE*",
    "encoding/*.py",
)
_SAMPLE = 1 << 20  # bytes at either end of a source file that its fingerprint covers
_PIECE = 1 << 22  # values converted at a time
_SPARE = 1 << 24  # bytes for headers and small files


@dataclass(frozen=True)
class Summary:
    """What a run made."""

    folder: Path
    recipe: str
    method: str
    source_bytes: int
    nbytes: int  # of all files with tensors
    files: int
    reused: int  # files that an earlier run had finished
    left_out: tuple[str, ...]  # kinds of tensors that the main model does not use


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    recipe: str,
    method: Method = "ls",
    importance: Importance | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write the checkpoint in `source` to the folder `target` in the shared format.

    recipe      a name in RECIPES
    method      how affine codes are found: "ls" least squares, "rtn" nearest in the full range
    importance  official name of a matrix -> how much the squared error of each input counts;
                used by "ls"
    progress    called with the source's bytes done, and in all

    Raises ConfigError, CheckpointError or QuantizeError; the same call then goes on where it
    stopped, as it does after a kill.
    """
    job = _Job(Path(source), Path(target), recipe, method, importance or {})
    try:
        return job.run(progress or (lambda done, total: None))
    except OSError as error:
        raise QuantizeError(
            f"{error.filename or target}: cannot be written: {error.strerror}; "
            "put that right and run the same again: it goes on where it stopped"
        ) from error


class _Job:
    def __init__(
        self, source: Path, folder: Path, recipe: str, method: Method, importance: Importance
    ) -> None:
        if recipe not in RECIPES:
            raise QuantizeError(f"no recipe is called {recipe!r}: there are {', '.join(RECIPES)}")
        if method not in METHODS:
            raise QuantizeError(f"method must be {' or '.join(METHODS)}, not {method!r}")
        self.source, self.folder = source, folder
        self.method, self.importance = method, importance
        self.checkpoint = Checkpoint(source)
        self.cfg = Config.from_file(source / "config.json")
        self.total = self.checkpoint.check(self.cfg)
        self.shards = plan(self.checkpoint, self.cfg, RECIPES[recipe])
        self.about: dict[str, Any] = {
            "format": 1,
            "recipe": recipe,
            "source": _fingerprint(self.checkpoint),
            "quantizer": {"method": method, "importance": _digest_of(importance)},
        }

    def run(self, progress: Progress) -> Summary:
        self._prepare()
        files = {
            name: ShardFile(
                self.folder / name, [p for target in targets for p in target.parts], self.about
            )
            for name, targets in self.shards.items()
        }
        done = {name for name, file in files.items() if self._finished(file)}
        self._check_space(sum(file.nbytes for name, file in files.items() if name not in done))
        count = sum(target.source_bytes for name in done for target in self.shards[name])
        progress(count, self.total)
        for name, file in files.items():
            if name in done:
                continue
            with file:
                for target in self.shards[name]:
                    for nbytes in self._write(file, target):
                        count += nbytes
                        progress(count, self.total)
        self._finish(list(files.values()))
        return Summary(
            self.folder,
            self.about["recipe"],
            self.method,
            self.total,
            sum(file.nbytes for file in files.values()),
            len(files),
            len(done),
            tuple(extra.kind for extra in self.checkpoint.extras),
        )

    # before

    def _prepare(self) -> None:
        """Make the folder, or see that it holds nothing but this very job, begun earlier."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.folder.samefile(self.source):
            raise QuantizeError(f"{self.folder}: is the source; give another folder to write to")
        for path in sorted(self.folder.glob("*.safetensors")):
            said = read_about(path) or {}
            if path.name not in self.shards or any(said.get(k) != v for k, v in self.about.items()):
                raise QuantizeError(
                    f"{path}: is of another model, recipe or method; "
                    "give an empty folder, or remove this one"
                )
        for leftover in self.folder.glob(f"*{TEMPORARY}"):
            leftover.unlink()

    def _finished(self, file: ShardFile) -> bool:
        """Whether the file is there, whole and undamaged."""
        if not file.path.exists():
            return False
        try:
            found = [(s.name, s.dtype, s.shape) for s in read_header(file.path).values()]
            wanted = [(p.name, p.dtype, p.shape) for p in file.parts]
            return sorted(found) == sorted(wanted) and not damaged(file.path)
        except CheckpointError:
            return False

    def _check_space(self, nbytes: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if nbytes + _SPARE > free:
            raise QuantizeError(
                f"{self.folder}: {nbytes + _SPARE:,} bytes are still to be written, but "
                f"{free:,} are free; make room or give a folder on another disk"
            )

    # one weight

    def _write(self, file: ShardFile, target: Target) -> Iterator[int]:
        """Append a target to its file; yields bytes of the source as they are done."""
        pieces, done = _in_order(self._pieces(target)), 0
        rows = target.shape[0] * len(target.sources)
        for piece in pieces:
            arrays = piece.data, piece.scales, piece.biases
            for part, array in zip(target.parts, arrays, strict=False):
                assert array is not None
                file.append(part.name, array)
            before, done = done, done + len(piece.data)
            yield target.source_bytes * done // rows - target.source_bytes * before // rows

    def _pieces(self, target: Target) -> Iterator[Callable[[], HostTensor]]:
        """The conversions of a target's pieces, first to last; each source is read when due."""
        for name in target.sources:
            tensor = self.checkpoint.read(name, target.shape)
            weight = self.importance.get(name)
            for rows in _split(tensor):
                yield partial(convert, rows, target.storage, self.method, weight)

    # after

    def _finish(self, files: list[ShardFile]) -> None:
        sums: dict[str, str] = {}
        index: dict[str, str] = {}
        for file in files:
            said = read_about(file.path) or {}
            sums |= said["xxh3_128"]
            index |= dict.fromkeys((part.name for part in file.parts), file.path.name)
        tensors = {name: {"xxh3_128": sums[name]} for name in sorted(sums)}
        _write_json(self.folder / MANIFEST, self.about | {"tensors": tensors})
        total = sum(part.nbytes for file in files for part in file.parts)
        weight_map = dict(sorted(index.items()))
        _write_json(
            self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
        for pattern in _KEPT:
            for path in sorted(self.source.glob(pattern)):
                if path.is_file():
                    copy = self.folder / path.relative_to(self.source)
                    copy.parent.mkdir(exist_ok=True)
                    write_whole(copy, path.read_bytes())
        _write_json(self.folder / "config.json", self._config())

    def _config(self) -> dict[str, Any]:
        fields = json.loads((self.source / "config.json").read_text("utf-8"))
        fields.pop("quantization_config", None)
        fields.pop("quantization", None)
        fields["expert_dtype"] = self.cfg.expert_dtype
        said = describe([target for targets in self.shards.values() for target in targets])
        return fields if said is None else fields | {"quantization": said}


def _split(tensor: HostTensor) -> Iterator[HostTensor]:
    """A tensor in runs of rows that end where FP8 blocks do."""
    rows = tensor.shape[0]
    step = max(_PIECE // max(tensor.data[0].size, 1) // FP8_BLOCK, 1) * FP8_BLOCK
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if tensor.format == "fp8":
            assert tensor.scales is not None
            scales = tensor.scales[start // FP8_BLOCK : -(-stop // FP8_BLOCK)]
            yield HostTensor("fp8", tensor.data[start:stop], scales)
        else:
            yield tensor.map(itemgetter(slice(start, stop)))


def _in_order(jobs: Iterable[Callable[[], HostTensor]]) -> Iterator[HostTensor]:
    """Results in the order of the jobs, a few of which run at once and ahead."""
    workers = min(os.cpu_count() or 1, 16)
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[HostTensor]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells one source from another, without reading all of it."""
    digest = xxhash.xxh3_128()
    total = 0
    for path in checkpoint.files:
        size = path.stat().st_size
        total += size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(size - _SAMPLE, 0))
            digest.update(file.read())
    digest.update((checkpoint.folder / "config.json").read_bytes())
    return {"bytes": total, "files": len(checkpoint.files), "sampled_xxh3_128": digest.hexdigest()}


def _digest_of(importance: Importance) -> str | None:
    if not importance:
        return None
    digest = xxhash.xxh3_128()
    for name in sorted(importance):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(importance[name], np.float32).tobytes())
    return digest.hexdigest()


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())
