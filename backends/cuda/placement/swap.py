"""Pinned experts follow what is wanted, slowly, while steps go on.

Where host memory cannot hold every expert, some are in a slot and nowhere else, and can never give
it away. When another one with a home is wanted far more, both being in slots, it lends its home:
1. its home_of becomes none: it is pinned now, and its home is free;
2. the other's bytes are copied there, by the copy engine, while steps read both slots;
3. when that is done, the other's home_of is that home: it may be evicted like any other.
No address changes, nothing that a step may read is overwritten.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .layer import Layer
from .policy import NOWHERE, LayerState, swaps
from .tables import Tables

AT_ONCE = 8  # of a layer


@dataclass(frozen=True)
class _Moving:
    changes: list[tuple[int, int, int]]  # layer, expert, its home when done
    done: Any  # event


class Swaps:
    """What is on its way to host memory."""

    def __init__(self, layers: list[Layer], tables: Tables | None) -> None:
        self.layers, self.tables = layers, tables
        self.count = 0
        self._moving: _Moving | None = None
        self._copying = torch.cuda.Stream() if tables is not None else None

    def turn(self, states: Callable[[], list[LayerState]]) -> None:
        """Between two steps: end what is done, begin what is due. `states` reads those of now."""
        if self._moving is not None:
            if self._moving.done is not None and not self._moving.done.query():
                return
            self._set_homes(self._moving.changes)
            self._moving = None
        found = [
            (layer, state, pair)
            for layer, state in zip(self.layers, states(), strict=True)
            for pair in swaps(replace(state, owner=state.owner[: layer.kept]), AT_ONCE)
        ]
        if not found:
            return
        self.count += len(found)
        jobs = [
            (layer, pinned, int(state.slot_of[pinned]), int(state.home_of[wanted]))
            for layer, state, (pinned, wanted) in found
        ]
        self._set_homes([(layer.number, wanted, NOWHERE) for layer, _, (_, wanted) in found])
        done = self._copy_out(jobs)
        self._moving = _Moving([(layer.number, e, home) for layer, e, _, home in jobs], done)

    def _copy_out(self, jobs: list[tuple[Layer, int, int, int]]) -> Any:
        if self._copying is None:
            for layer, _, slot, home in jobs:
                layer.copy_out(slot, home)
            return None
        self._copying.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copying):
            for layer, _, slot, home in jobs:
                layer.copy_out(slot, home)
            return self._copying.record_event()

    def _set_homes(self, changes: list[tuple[int, int, int]]) -> None:
        if self.tables is not None:
            self.tables.set_homes(changes)
            return
        for layer, expert, home in changes:
            self.layers[layer].state.home_of[expert] = home
