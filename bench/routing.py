"""Which experts a step needs, as it really routes."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ds4 import model as definition
from ds4.runner import Runner
from ds4.step import Chunk, plan

from .models import Model


@dataclass(frozen=True)
class Seen:
    """Means over the layers of one step."""

    experts: float  # different ones
    repeated: float  # share of the chosen that the token before, in the same slot, chose too


class _Watched:
    """A backend that keeps the ids of `route`."""

    def __init__(self, be: Any) -> None:
        self.be = be
        self.ids: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.be, name)

    def route(self, *args: Any) -> Any:
        ids, weights = self.be.route(*args)
        self.ids.append(self.be.download(ids))
        return ids, weights


def watch(model: Model, runner: Runner) -> Seen:
    """Route one token a slot, and another after it, without keeping either."""
    steps = [_route(model, runner, ahead) for ahead in range(2)]
    pairs = list(zip(*steps, strict=True))
    repeated = [
        np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(before, after, strict=True)])
        for before, after in pairs
    ]
    experts = [len(np.unique(after)) for _, after in pairs]
    return Seen(float(np.mean(experts)), float(np.mean(repeated)))


def _route(model: Model, runner: Runner, ahead: int) -> list[np.ndarray]:
    be: Any = _Watched(model.be)
    chunks = [
        Chunk(slot, runner.lengths[slot] + ahead, ids)
        for slot, ids in model.next_tokens(runner.slots).items()
    ]
    ratios = sorted({ratio for ratio in model.cfg.compress_ratios if ratio})
    step = plan(chunks, ratios, pad_to=len(chunks)).on(be)
    definition.forward(be, model.cfg, model.weights, runner.cache, step)
    return be.ids
