"""Passes of the model for many requests, and the choice of their next tokens."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..backend import Array, Backend
from ..runner import Runner
from ..sampler import Row, Sampler, SamplingParams, pick
from .grammar import masks
from .run import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picked:
    """Chosen tokens (n,), still on the device: of `runs`, then padding."""

    tokens: Array
    runs: Sequence[Run]
    logits: dict[int, NDArray[np.float32]]  # of rows whose probabilities are wanted

    def read(self, be: Backend) -> Iterator[tuple[Run, int, NDArray[np.float32] | None]]:
        """Each request with its token: here the host waits."""
        tokens = be.download(self.tokens)
        for row, run in enumerate(self.runs):
            yield run, int(tokens[row]), self.logits.get(row)


class Passes:
    """What the engine asks of a Runner. Decode steps are padded to sizes that are recorded."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.be = runner, runner.be
        self._sizes: Sequence[int] = getattr(runner.be, "decode_sizes", ())

    def size(self, count: int) -> int:
        """Rows of a step of `count` tokens."""
        return next((size for size in self._sizes if size >= count), count)

    def warm(self, users: int, chunk: int) -> None:
        """Decode steps for one and for `users` users, twice, and a chunk: the first compiles."""
        runner, slots = self.runner, range(self.runner.slots)
        some = Sampler(SamplingParams(seed=0), [], runner.cfg.vocab_size)
        for size in sorted({self.size(1), self.size(min(users, len(slots)))}):
            start = time.perf_counter()
            for _ in range(2):
                tokens = self.be.upload(np.zeros(size, np.int32))
                logits = runner.run_ahead(slots[:size], tokens)
            for rows in ([None] * size, [(some, 0)] * size):
                self.be.download(pick(self.be, logits, rows))
            log.info("decode steps of %d rows: %.1f s", size, time.perf_counter() - start)
        start = time.perf_counter()
        runner.rewind(0, 0)
        self.be.download(runner.run({0: [0] * chunk}))
        log.info("a chunk of %d tokens: %.1f s", chunk, time.perf_counter() - start)

    def decode(self, known: Sequence[Picked], runs: Sequence[Run]) -> Array:
        """Logits of the next token of `runs`; then padding.

        Their last tokens are among `known`, or, after a round of guesses, the host knows them.
        """
        at: dict[int, int] = {}
        start = 0
        for picked in known:
            at |= {id(run): start + row for row, run in enumerate(picked.runs)}
            start += len(picked.tokens)
        told = [run for run in runs if id(run) not in at]
        if told:
            last = self.be.upload(np.array([run.tokens[-1] for run in told], np.int32))
            known = [*known, Picked(last, told, {})]
            at |= {id(run): start + row for row, run in enumerate(told)}
            start += len(told)
        rows = [at[id(run)] for run in runs]
        size = self.size(len(rows))
        if len(known) == 1 and size == start and rows == list(range(len(rows))):
            tokens = known[0].tokens
        else:
            padded = np.array(rows + [0] * (size - len(rows)), np.int32)
            tokens = self.be.gather([picked.tokens for picked in known], self.be.upload(padded))
        return self.runner.run_ahead([_slot(run) for run in runs], tokens)

    def prefill(self, chunks: Sequence[tuple[Run, int]], mark: bool = False) -> list[Picked]:
        """Absorb so many tokens of each prompt; the first tokens of those that are now complete.

        If none is, `mark` asks for a choice for nobody, to wait for: else the host could queue all
        of a long prompt, and whoever comes meanwhile would wait for all of it.
        """
        most = max(self._sizes, default=0)
        together = sum(count for _, count in chunks) > most  # else each in a recorded shape
        groups = [chunks] if together and chunks else [[chunk] for chunk in chunks]
        picked = []
        for group in groups:
            tokens = {
                _slot(run): run.tokens[run.job.done : run.job.done + count] for run, count in group
            }
            pad_to = 0 if together else self.size(group[0][1])
            logits = self.runner.run({slot: ids.tolist() for slot, ids in tokens.items()}, pad_to)
            complete = [row for row, (run, count) in enumerate(group) if run.job.left == count]
            if complete:
                if len(complete) < len(group):
                    logits = self.be.take(logits, self.be.upload(np.array(complete, np.int32)))
                picked.append(self.choose(logits, [group[row][0] for row in complete]))
        if mark and groups and not picked:
            picked.append(self.choose(logits, []))
        return picked

    def choose(self, logits: Array, runs: Sequence[Run]) -> Picked:
        """The next token of each run, from its row of logits (n, V); what is beyond is padding."""
        count, vocab = len(logits), self.runner.cfg.vocab_size
        live = [(row, run) for row, run in enumerate(runs) if not run.over]
        wanted = [row for row, run in live if run.request.params.logprobs is not None]
        seen: dict[int, NDArray[np.float32]] = {}
        if wanted:
            rows = self.be.take(logits, self.be.upload(np.array(wanted, np.int32)))
            seen = dict(zip(wanted, self.be.download(rows), strict=True))
        guided = [(row, run.matcher) for row, run in live if run.matcher is not None]
        allowed = masks(guided, (count, vocab)) if guided else None
        samplers: list[Row | None] = [None] * count
        for row, run in live:
            samplers[row] = run.sampler, run.next_position
            run.chosen += 1
        return Picked(pick(self.be, logits, samplers, allowed), runs, seen)


def _slot(run: Run) -> int:
    assert run.job.slot is not None
    return run.job.slot
