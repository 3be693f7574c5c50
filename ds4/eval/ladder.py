"""Checkpoints made from one source, and measured beside it on one text."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from ..config import Config
from ..llm import LLM
from ..quant.calibration import Calibration, calibrate
from ..quant.quantize import quantize_checkpoint
from ..weights.checkpoint import Checkpoint
from ..weights.names import expected
from .score import Progress, Reference, Score, reader, score
from .variants import Variant
from .windows import cut_for

Watch = Callable[[str], Progress | None]  # what is being done -> a callback for how far it is


@dataclass(frozen=True)
class Row:
    """What came of a variant; None is the source itself."""

    variant: Variant | None
    nbytes: int  # of the tensors that the model uses
    parameters: int
    score: Score

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters


class Ladder:
    """Makes variants of a source and measures them.

    load         opens a folder
    text         to measure on, `window` tokens at a time, the first `tokens` of it (None: all)
    calibration  another text, to calibrate on
    folder       where checkpoints stay and are found again; None: each goes once it is measured

    Raises what loading and quantizing raise.
    """

    def __init__(
        self,
        source: Path,
        load: Callable[[Path], LLM],
        text: str,
        calibration: str,
        window: int,
        tokens: int | None = None,
        folder: Path | None = None,
        watch: Watch = lambda what: None,
    ) -> None:
        self.source, self.load, self.folder, self.watch = source, load, folder, watch
        llm = load(source)
        self.windows = cut_for(llm, text, window, tokens)
        self.reference = Reference(
            reader(llm, self.windows), self.windows, watch("reading with the source")
        )
        self.calibration = self._calibrate(llm, calibration)
        self.cfg, self.backend, self.device = llm.config, llm.backend_name, llm.device
        self.top = _row(None, source, self.reference.score)
        self._rows: dict[Variant, Row] = {}

    def measure(self, variants: Sequence[Variant]) -> list[Row]:
        """A row for each. What was measured once is not measured again."""
        for variant in variants:
            if variant not in self._rows:
                with self._place() as place:
                    self._rows[variant] = self._make(variant, Path(place) / variant.name)
        return [self._rows[variant] for variant in variants]

    def _place(self) -> AbstractContextManager[str | Path]:
        return tempfile.TemporaryDirectory() if self.folder is None else nullcontext(self.folder)

    def _make(self, variant: Variant, folder: Path) -> Row:
        quantize_checkpoint(
            self.source,
            folder,
            variant.recipe,
            variant.method,
            self.calibration.importance if variant.calibrated else None,
            self.watch(f"making {variant.name}"),
            variant.keep(self.calibration),
        )
        llm = self.load(folder)
        progress = self.watch(f"reading with {variant.name}")
        found = score(reader(llm, self.windows), self.windows, self.reference, progress)
        return _row(variant, folder, found)

    def _calibrate(self, llm: LLM, text: str) -> Calibration:
        """What the source sees in the other text; kept in the folder, if there is one."""
        windows = cut_for(llm, text, llm.config.max_position_embeddings)
        ids = [token for window in windows.ids for token in window]
        kept = self.folder and self.folder / f"calibration-{self._digest(ids)}.npz"
        if kept is not None and kept.exists():
            return Calibration.load(kept)
        found = calibrate(llm, ids, self.watch("calibrating"))
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            found.save(kept)
        return found

    def _digest(self, ids: Sequence[int]) -> str:
        """What a calibration depends on: the text, and the source by the looks of its files."""
        digest = xxhash.xxh3_64(np.array(ids, np.int64).tobytes())
        for path in (self.source / "config.json", *Checkpoint(self.source).files):
            about = path.stat()
            digest.update(f"{path.name} {about.st_size} {about.st_mtime_ns}".encode())
        return digest.hexdigest()


def _row(variant: Variant | None, folder: Path, found: Score) -> Row:
    cfg = Config.from_file(folder / "config.json")
    parameters = sum(int(np.prod(shape)) for shape in expected(cfg).values())
    return Row(variant, Checkpoint(folder).check(cfg), parameters, found)
