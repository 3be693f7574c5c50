"""What a model makes of a text: the probability of each token, alone and beside another model's.

The other model, the reference, runs first and leaves its log-probabilities in a file, so that no
two models are ever in memory and one reference serves many comparisons.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PromptError
from ..llm import LLM
from ..runner import Runner
from .windows import Windows

Array = NDArray[Any]
Progress = Callable[[int, int], None]

_ROWS = 64  # log-probabilities compared at a time: temporaries stay small
_TOGETHER = 4  # windows read in one step on a GPU; on a CPU they gain nothing


@dataclass(frozen=True)
class Score:
    """A model on some windows. With a reference, how far from it the model is, token by token."""

    windows: Windows
    losses: Array  # (tokens,) nats
    kl: Array | None = None  # (tokens,) nats, of the reference's prediction from the model's
    same: Array | None = None  # (tokens,) whether both predict the same token

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.losses.mean()))

    @property
    def bits_per_byte(self) -> float:
        return float(self.losses.sum() / np.log(2) / self.windows.nbytes)

    @property
    def mean_kl(self) -> float | None:
        """Nats a token."""
        return None if self.kl is None else float(self.kl.mean())

    @property
    def kl_error(self) -> float | None:
        """The standard error of mean_kl, were the tokens drawn one by one."""
        return None if self.kl is None else float(self.kl.std() / np.sqrt(len(self.kl)))

    @property
    def top1(self) -> float | None:
        """The share of tokens for which both models think the same one likeliest."""
        return None if self.same is None else float(self.same.mean())


class Reference:
    """A model's log-probabilities (tokens, vocabulary) for some windows, in a temporary file.

    Raises PromptError where the disk has no room for them.
    """

    def __init__(self, runner: Runner, windows: Windows, progress: Progress | None = None) -> None:
        self.windows = windows
        shape = windows.tokens, runner.cfg.vocab_size
        _check_space(4 * shape[0] * shape[1])
        with tempfile.TemporaryFile() as file:  # gone when the map is
            self.rows = np.memmap(file, np.float32, "w+", shape=shape)
        losses = np.empty(shape[0], np.float64)
        for at, logits, targets in _predictions(runner, windows, progress):
            found = log_softmax(logits)
            self.rows[at : at + len(found)] = found
            losses[at : at + len(found)] = _losses(found, targets)
        self.score = Score(windows, losses)


def reader(llm: LLM, windows: Windows) -> Runner:
    """A runner of a loaded model with room for as many windows at once as its device likes."""
    slots = min(1 if llm.device == "cpu" else _TOGETHER, len(windows.ids))
    longest = max(map(len, windows.ids))
    return Runner(llm.runner.be, llm.config, llm.runner.weights, longest, slots)


def score(
    runner: Runner,
    windows: Windows,
    reference: Reference | None = None,
    progress: Progress | None = None,
) -> Score:
    """Run a model over the windows, `runner.slots` of them at a time.

    `progress` is called with tokens done and tokens in all. Raises PromptError if the reference is
    of another text or vocabulary, or a window does not fit the context.
    """
    if reference is not None and (
        reference.windows != windows or reference.rows.shape[1] != runner.cfg.vocab_size
    ):
        raise PromptError("model and reference differ in tokenizer or vocabulary: compare others")
    losses, kl = np.empty((2, windows.tokens), np.float64)
    same = np.empty(windows.tokens, bool)
    for at, logits, targets in _predictions(runner, windows, progress):
        to = slice(at, at + len(logits))
        found = log_softmax(logits)
        losses[to] = _losses(found, targets)
        if reference is not None:
            wanted = reference.rows[to]
            kl[to] = (np.exp(wanted) * (wanted - found)).sum(-1, dtype=np.float64)
            same[to] = found.argmax(-1) == wanted.argmax(-1)
    return Score(windows, losses) if reference is None else Score(windows, losses, kl, same)


def log_softmax(logits: Array) -> Array:
    """float32 (rows, V) -> float32, log-probabilities."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(
        np.float32
    )


def _losses(log_probabilities: Array, targets: Array) -> Array:
    return -log_probabilities[np.arange(len(targets)), targets]


def _predictions(
    runner: Runner, windows: Windows, progress: Progress | None
) -> Iterator[tuple[int, Array, Array]]:
    """(first token's number, logits of a few tokens, the tokens that were to be predicted)."""
    starts = np.cumsum([0, *(len(ids) - 1 for ids in windows.ids)])
    done = 0
    for first in range(0, len(windows.ids), runner.slots):
        group = windows.ids[first : first + runner.slots]
        for slot in range(runner.slots):
            runner.rewind(slot, 0)
        for begin in range(0, max(map(len, group)) - 1, runner.max_chunk):
            chunks = {s: ids[begin:-1][: runner.max_chunk] for s, ids in enumerate(group)}
            chunks = {slot: chunk for slot, chunk in chunks.items() if chunk}
            logits = runner.be.download(runner.run(dict(chunks), every_row=True))
            row = 0
            for slot, chunk in chunks.items():
                targets = np.array(group[slot][begin + 1 :][: len(chunk)])
                at = int(starts[first + slot]) + begin
                for i in range(0, len(chunk), _ROWS):
                    some = logits[row + i : row + min(i + _ROWS, len(chunk))]
                    yield at + i, some, targets[i : i + _ROWS]
                row += len(chunk)
            done += row
            if progress is not None:
                progress(done, windows.tokens)


def _check_space(nbytes: int) -> None:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise PromptError(
            f"{folder}: the reference's predictions take {nbytes:,} bytes, but {free:,} are free: "
            "evaluate on fewer tokens, or let TMPDIR name a folder on another disk"
        )
