"""A checkpoint in a recipe's formats, made layer by layer from an official one.

A run that was killed is taken up where it stopped, with the same bytes in the end: finished files
are known by the settings and checksums in their headers. config.json comes last, so that nothing
loads a half-made folder.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, QuantizeError
from ..weights.shard_file import TEMPORARY, ShardFile, damaged, read_about, replace_file
from ..weights.shards import INDEX, read_header
from .about import digest_of, fingerprint
from .arrays import open_arrays
from .calibration import Calibration
from .convert import METHODS, Method
from .encoder import Encoder, Importance
from .inputs import Inputs, Recorder
from .prepare import Text, forget, prepare
from .pruning import PrunedCheckpoint, open_source, reap
from .recipes import RECIPES
from .targets import Target, describe, plan

Progress = Callable[[int, int], None]

MANIFEST = "manifest.json"
_KEPT = (
    "tokenizer*",
    "special_tokens_map.json",
    "*_config.json",
    "*.jinja",
    "LICENSE*",
    "encoding/*.py",
)
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
    left_out: tuple[str, ...]  # kinds of tensors that were not taken over
    device: str  # where scales and codes were looked for
    tokens: int = 0  # read to calibrate; 0 also if every file was there already
    rare: int = 0  # experts that too few of these chose to go by their own statistics alone


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    recipe: str,
    method: Method = "ls",
    importance: Importance | None = None,
    progress: Progress | None = None,
    *,
    inputs: Inputs | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    reading: Progress | None = None,
    backend: str = "auto",
    device: str = "auto",
    experts: int | None = None,
    saliency: Mapping[int, Any] | None = None,
) -> Summary:
    """Write the checkpoint in `source` to the folder `target` in the shared format.

    recipe      a name in RECIPES
    method      how affine codes are found: "ls" least squares, "gptq" least squares with error
                feedback for the experts, "rtn" nearest in the full range
    importance  official name of a matrix -> how much the squared error of each input counts
    progress    called with the source's bytes done, and in all
    inputs      what the experts are given, for "gptq"
    calibrate   a text to read first, from which importance and inputs come
    reading     called with the text's tokens done, and in all
    backend     reads the text
    device      computes: "cpu", "cuda", or "auto" for a GPU if PyTorch sees one
    experts     how many to keep of each layer; None keeps all
    saliency    layer -> (E,), which ones: the largest. Else the text decides, as in `reap`

    Raises ConfigError, CheckpointError or QuantizeError; the same call then goes on where it
    stopped, as it does after a kill. The bytes depend on the device, and are the same each time.
    """
    job = _Job(Path(source), Path(target), recipe, method, device, experts)
    job.importance, job.inputs, job.saliency = importance or {}, inputs, saliency
    job.read_first(calibrate, backend, reading)
    new = not job.folder.exists()
    try:
        return job.run(progress or (lambda done, total: None))
    except OSError as error:
        raise QuantizeError(
            f"{error.filename or target}: cannot be written: {error.strerror}; "
            "put that right and run the same again: it goes on where it stopped"
        ) from error
    finally:
        if new and job.folder.is_dir() and not any(job.folder.iterdir()):
            job.folder.rmdir()  # nothing came of it


class _Job:
    importance: Importance
    inputs: Inputs | None
    saliency: Mapping[int, Any] | None

    def __init__(
        self, source: Path, folder: Path, recipe: str, method: Method, device: str, left: int | None
    ) -> None:
        if recipe not in RECIPES:
            raise QuantizeError(f"no recipe is called {recipe!r}: there are {', '.join(RECIPES)}")
        if method not in METHODS:
            raise QuantizeError(f"method must be {' or '.join(METHODS)}, not {method!r}")
        self.source, self.folder, self.recipe, self.method = source, folder, recipe, method
        self.device, self.on = device, open_arrays(device)
        self.checkpoint, self.cfg = open_source(source, left)
        self.total = self.checkpoint.check_all(self.cfg)
        self.shards = plan(self.checkpoint, self.cfg, RECIPES[recipe])
        self.text: Text | None = None
        self.calibration: Calibration | None = None

    def read_first(
        self, text: str | os.PathLike[str] | None, backend: str, reading: Progress | None
    ) -> None:
        """Settle what weighs the errors, and with it what tells this job from others."""
        pruned = isinstance(self.checkpoint, PrunedCheckpoint)
        if text is not None and self.method == "rtn" and not pruned:
            raise QuantizeError("method rtn has no use for a text to calibrate on: leave it out")
        if text is None and self.inputs is None and self.method == "gptq":
            raise QuantizeError("method gptq needs a text to calibrate on: --calibrate FILE")
        if pruned and text is None and self.saliency is None:
            raise QuantizeError("to choose experts takes a text: --calibrate FILE")
        self.text = None if text is None else Text(text, self.source)
        self.backend, self.reading = backend, reading
        self.about: dict[str, Any] = {
            "format": 1,
            "recipe": self.recipe,
            "source": fingerprint(self.checkpoint),
            "quantizer": {
                "method": self.method,
                "device": self.on.name,
                "importance": digest_of(self.importance),
                "text": None if self.text is None else self.text.digest,
            },
        }
        named = {str(layer): each for layer, each in (self.saliency or {}).items()}
        self.about["pruning"] = [self.cfg.n_routed_experts, digest_of(named)] if pruned else None

    def run(self, progress: Progress) -> Summary:
        self._prepare()
        files = {
            name: ShardFile(
                self.folder / name, [p for target in targets for p in target.parts], self.about
            )
            for name, targets in self.shards.items()
        }
        done = {name for name, file in files.items() if self._finished(file)}
        if len(done) < len(files):
            self._check_space(sum(f.nbytes for name, f in files.items() if name not in done))
            self._read()
            if isinstance(self.checkpoint, PrunedCheckpoint):
                self.importance, self.inputs = self.checkpoint.keep(
                    self.saliency or {}, self.importance, self.inputs
                )
        encoder = Encoder(
            self.checkpoint, self.cfg, self.method, self.importance, self.inputs, self.on
        )
        count = sum(target.source_bytes for name in done for target in self.shards[name])
        progress(count, self.total)
        for name, file in files.items():
            if name in done:
                continue
            with file:
                for target in self.shards[name]:
                    for nbytes in self._write(file, target, encoder):
                        count += nbytes
                        progress(count, self.total)
        self._finish(list(files.values()))
        return Summary(
            self.folder,
            self.recipe,
            self.method,
            self.total,
            sum(file.nbytes for file in files.values()),
            len(files),
            len(done),
            tuple(e.kind for e in self.checkpoint.extras if e.kind != self.checkpoint.drafter),
            self.on.name,
            self.calibration.tokens if self.calibration else 0,
            self.calibration.rare if self.calibration else 0,
        )

    def _read(self) -> None:
        """Read the text, if there is one, or find what an earlier run kept of it."""
        if self.text is None:
            return
        device = "cpu" if self.device == "cpu" else "auto"
        record = self.method == "gptq"
        key = f"{self.about['source']['sampled_xxh3_128']}-{self.text.digest}"
        self.calibration, self.inputs = prepare(
            self.source, self.folder, self.text, key, record, self.backend, device, self.reading
        )
        self.importance = self.calibration.importance
        self.saliency = self.saliency or reap(self.calibration)

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
                    f"{path}: is of another model, recipe or method, or made on another device; "
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
        if self.text is not None and self.method == "gptq":
            nbytes += Recorder(self.folder / "inputs", self.cfg, len(self.text.ids)).nbytes
        free = shutil.disk_usage(self.folder).free
        if nbytes + _SPARE > free:
            raise QuantizeError(
                f"{self.folder}: {nbytes + _SPARE:,} bytes are still to be written, but "
                f"{free:,} are free; make room or give a folder on another disk"
            )

    # one weight

    def _write(self, file: ShardFile, target: Target, encoder: Encoder) -> Iterator[int]:
        """Append a target to its file; yields bytes of the source as they are done."""
        done, rows = 0, target.shape[0] * len(target.sources)
        for piece in encoder.pieces(target):
            arrays = piece.data, piece.scales, piece.biases
            for part, array in zip(target.parts, arrays, strict=False):
                assert array is not None
                file.append(part.name, array)
            before, done = done, done + len(piece.data)
            yield target.source_bytes * done // rows - target.source_bytes * before // rows

    # after

    def _finish(self, files: list[ShardFile]) -> None:
        sums: dict[str, str] = {}
        index: dict[str, str] = {}
        for file in files:
            sums |= (read_about(file.path) or {})["xxh3_128"]
            index |= dict.fromkeys((part.name for part in file.parts), file.path.name)
        tensors = {name: {"xxh3_128": sums[name]} for name in sorted(sums)}
        _write_json(self.folder / MANIFEST, self.about | {"tensors": tensors})
        total = sum(part.nbytes for file in files for part in file.parts)
        index = dict(sorted(index.items()))
        _write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
        for pattern in _KEPT:
            for path in filter(Path.is_file, sorted(self.source.glob(pattern))):
                copy = self.folder / path.relative_to(self.source)
                copy.parent.mkdir(exist_ok=True)
                replace_file(copy, path.read_bytes())
        _write_json(self.folder / "config.json", self._config())
        forget(self.folder)

    def _config(self) -> dict[str, Any]:
        fields = json.loads((self.source / "config.json").read_text("utf-8"))
        fields.pop("quantization_config", None)
        fields.pop("quantization", None)
        fields["expert_dtype"] = self.cfg.expert_dtype
        if isinstance(self.checkpoint, PrunedCheckpoint):
            fields |= self.checkpoint.fields
        said = describe([target for targets in self.shards.values() for target in targets])
        return fields if said is None else fields | {"quantization": said}


def _write_json(path: Path, value: Any) -> None:
    replace_file(path, (json.dumps(value, indent=1) + "\n").encode())
