"""A synthetic model on a backend, its caches filled as if a sequence had run for long."""

import gc
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ds4 import model as definition
from ds4.backend import Backend, CacheMode, Weights, open_backend
from ds4.config import Config
from ds4.loader import Synthetic
from ds4.runner import Runner
from ds4.step import Chunk, Step, plan
from ds4.weights import load_weights
from ds4.weights.synthetic import SyntheticCheckpoint

SEED_TOKENS = 256  # really run, to have rows that others are made from
FEW = 32  # of them at once: what decoding takes too, so that nothing is compiled for this alone
REPETITION = 0.3  # with skewed routing, how often a token is the one before it


@dataclass
class Model:
    """Weights on a device, and how they were made."""

    synthetic: Synthetic
    cfg: Config
    be: Backend
    weights: Weights
    source: SyntheticCheckpoint
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    _last: dict[int, int] = field(default_factory=dict)

    def tokens(self, count: int) -> list[int]:
        """Random ones. With skewed routing some repeat, and so do the experts that they get."""
        ids = self._rng.integers(3, self.cfg.vocab_size, count)
        if self.synthetic.routing == "skewed":
            for i in np.flatnonzero(self._rng.random(count - 1) < REPETITION) + 1:
                ids[i] = ids[i - 1]
        return [int(i) for i in ids]

    def next_tokens(self, slots: int) -> dict[int, list[int]]:
        """One for each slot, random, or with skewed routing at times the one before it."""
        for slot, token in enumerate(self.tokens(slots)):
            again = self.synthetic.routing == "skewed" and self._rng.random() < REPETITION
            self._last[slot] = self._last.get(slot, token) if again else token
        return {slot: [self._last[slot]] for slot in range(slots)}

    def runner(self, slots: int, context: int, max_chunk: int, length: int = 0) -> Runner:
        """Empty caches, or ones that hold `length` tokens a slot."""
        runner = Runner(self.be, self.cfg, self.weights, context, slots, max_chunk)
        if length:
            _fill(runner, self.tokens(min(SEED_TOKENS, length, runner.max_chunk)), length)
        return runner


def open_model(
    synthetic: Synthetic, backend: str = "cuda", device: str = "auto", cache: CacheMode = "native"
) -> Model:
    be = open_backend(backend, device, cache)
    cfg, source = synthetic.config(), synthetic.source()
    return Model(synthetic, cfg, be, load_weights(be, cfg, source), source)


def free(device: str) -> None:
    """Give memory that nothing uses any more back to the device."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _fill(runner: Runner, tokens: list[int], length: int) -> None:
    """Let every slot hold `length` tokens: rows of a short real run, mixed at random.

    Each row takes each half of its channels, and its scales, from a row of that run: values that
    the formats allow and scores that differ, whatever a backend's layout.
    """

    def forward(step: Step) -> Any:
        be, cfg, weights = runner.be, runner.cfg, runner.weights
        return definition.forward(be, cfg, weights, runner.cache, step.on(be))

    placement: Any = getattr(runner.be, "placement", None)
    if placement is not None:
        forward = placement.around(forward)
    ratios = sorted({ratio for ratio in runner.cfg.compress_ratios if ratio})
    for start in range(0, len(tokens), FEW):
        chunk = Chunk(0, start, tokens[start : start + FEW])
        forward(plan([chunk], ratios))
    rng = np.random.default_rng(1)
    for c, ratio in zip(runner.cache, runner.cfg.compress_ratios, strict=True):
        for rows in (c.window, c.rows, c.index_rows):
            _mix(rows, len(tokens), rng)
        for rows in (c.pool, c.index_pool):
            _mix(rows, len(tokens) // ratio if ratio else 0, rng)
    runner.lengths = [length] * runner.slots
    runner._reach = [length] * runner.slots


def _mix(rows: Any, valid: int, rng: np.random.Generator) -> None:
    """Make every row of a cache from its first `valid` ones, of slot 0."""
    for plane in vars(rows).values() if rows is not None and valid else ():
        if not isinstance(plane, torch.Tensor) or plane.ndim != 3:
            continue
        slots, size, width = plane.shape
        for half in (slice(0, width // 2), slice(width // 2, width)):
            picks = torch.from_numpy(rng.integers(0, valid, slots * size)).to(plane.device)
            source = plane[0, :valid, half].clone()
            plane[:, :, half] = source[picks].view(slots, size, -1)
