"""Checkpoints made from one source, and measured beside it on one text."""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ..config import Config
from ..llm import LLM
from ..plan.sizes import parameters
from ..quant.about import fingerprint
from ..quant.calibration import Calibration, calibrate
from ..quant.inputs import Inputs, Recorder
from ..quant.prepare import Text
from ..quant.quantize import quantize_checkpoint
from ..weights.checkpoint import Checkpoint
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
    """Makes variants of a source and measures them; to be used in a `with`.

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
        calibration: Path,
        window: int,
        tokens: int | None = None,
        folder: Path | None = None,
        watch: Watch = lambda what: None,
    ) -> None:
        self.source, self.load, self.folder, self.watch = source, load, folder, watch
        self._spare = tempfile.TemporaryDirectory()
        llm = load(source)
        self.windows = cut_for(llm, text, window, tokens)
        self.reference = Reference(
            reader(llm, self.windows), self.windows, watch("reading with the source")
        )
        self.calibration, self.inputs = self._calibrate(llm, calibration)
        self.cfg, self.backend, self.device = llm.config, llm.backend_name, llm.device
        self.top = _row(None, source, self.reference.score)
        self._rows: dict[Variant, Row] = {}

    def __enter__(self) -> "Ladder":
        return self

    def __exit__(self, *_: object) -> None:
        self._spare.cleanup()

    def measure(self, variants: Sequence[Variant]) -> list[Row]:
        """A row for each. What was measured once is not measured again."""
        for variant in variants:
            if variant not in self._rows:
                self._rows[variant] = self._make(variant, self._place / variant.name)
        return [self._rows[variant] for variant in variants]

    @property
    def _place(self) -> Path:
        return self.folder or Path(self._spare.name)

    def _make(self, variant: Variant, folder: Path) -> Row:
        quantize_checkpoint(
            self.source,
            folder,
            variant.recipe,
            variant.method,
            self.calibration.importance if variant.calibrated else None,
            self.watch(f"making {variant.name}"),
            inputs=self.inputs if variant.method == "gptq" else None,
            experts=variant.experts,
            saliency=variant.saliency(self.calibration),
        )
        llm = self.load(folder)
        progress = self.watch(f"reading with {variant.name}")
        found = score(reader(llm, self.windows), self.windows, self.reference, progress)
        row = _row(variant, folder, found)
        if self.folder is None:
            shutil.rmtree(folder)
        return row

    def _calibrate(self, llm: LLM, path: Path) -> tuple[Calibration, Inputs]:
        """What the source sees in the other text; kept in the folder, if there is one."""
        text = Text(path, self.source)
        source = json.dumps(fingerprint(Checkpoint(self.source)))
        digest = xxhash.xxh3_64_hexdigest((text.digest + source).encode())
        seen, inputs = (self._place / f"{kind}-{digest}" for kind in ("calibration", "inputs"))
        if not seen.exists():
            self._place.mkdir(parents=True, exist_ok=True)
            with Recorder(inputs, llm.config, len(text.ids)) as recorder:
                found = calibrate(llm, text.ids, self.watch("calibrating"), recorder.add)
            found.save(seen)
        return Calibration.load(seen), Inputs(inputs)


def _row(variant: Variant | None, folder: Path, found: Score) -> Row:
    cfg = Config.from_file(folder / "config.json")
    return Row(variant, Checkpoint(folder).check(cfg), parameters(cfg), found)
