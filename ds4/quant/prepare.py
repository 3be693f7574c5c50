"""Reading a text with the model before it is quantized; a killed run need not read again."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from ..config import Config
from ..errors import QuantizeError
from ..tokenizer import Tokenizer
from .calibration import Calibration, calibrate
from .inputs import Inputs, Recorder

Progress = Callable[[int, int], None]

_LEAST = 256  # tokens; fewer say nothing of any expert


class Text:
    """A text to read, as the model's tokens.

    Raises QuantizeError if it cannot be read or is too short.
    """

    def __init__(self, path: str | os.PathLike[str], model: Path) -> None:
        self.path = path
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            problem = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise QuantizeError(f"{path}: cannot be read as text: {problem}") from None
        if not (model / "tokenizer.json").exists():
            raise QuantizeError(f"{model}: has no tokenizer.json, which calibration needs")
        tokenizer = Tokenizer.from_file(model / "tokenizer.json")
        self.ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        if len(self.ids) < _LEAST:
            raise QuantizeError(
                f"{path}: has {len(self.ids)} tokens; give at least {_LEAST}, better 100,000"
            )

    @property
    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(np.asarray(self.ids, np.int64).tobytes())


def prepare(
    model: Path,
    folder: Path,
    text: Text,
    key: str,
    record: bool,
    backend: str,
    device: str,
    progress: Progress | None,
) -> tuple[Calibration, Inputs | None]:
    """What was seen of a text, and with `record` the experts' inputs; kept in `folder`.

    A run that finds both there under `key`, which names model and text, reads nothing again.
    """
    seen, inputs = (folder / f"{kind}-{key}" for kind in _KEPT)
    if not seen.exists() or (record and not inputs.exists()):
        from ..loader import choose_backend, load

        name = choose_backend()[0] if backend == "auto" else backend
        if name == "cuda":
            name = "torch"  # the same device, but every operation can be watched
        cfg = Config.from_file(model / "config.json")
        llm = load(model, name, device, context=min(2048, cfg.max_position_embeddings))
        if record:
            with Recorder(inputs, cfg, len(text.ids)) as recorder:
                made = calibrate(llm, text.ids, progress, recorder.add)
        else:
            made = calibrate(llm, text.ids, progress)
        made.save(seen)
    return Calibration.load(seen), Inputs(inputs) if record else None


def forget(folder: Path) -> None:
    """Remove what `prepare` kept."""
    for kind in _KEPT:
        for path in folder.glob(f"{kind}-*"):
            path.unlink()


_KEPT = ("calibration", "inputs")
