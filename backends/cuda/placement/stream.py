"""Long steps: every layer's experts that are not on the GPU pass through a ring of three sections.

A layer's experts are taken in groups of neighbours. While one group is multiplied, and while the
next layer attends, a copy engine fills the other sections with what the next groups lack. Where
each expert will be is known before the step begins, so that all addresses are uploaded once.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ds4.plan.placement import SECTIONS

from .layer import MATRICES, Layer
from .policy import LayerState


@dataclass(frozen=True)
class Group:
    """Neighbouring experts of a layer, and which homes go where in the section."""

    layer: int
    first: int
    stop: int
    runs: list[tuple[int, int, int]]  # home, place, how many


def plan_pass(states: list[LayerState], size: int) -> list[Group]:
    """The groups of a step in the order in which it needs them, each with up to `size` experts.

    Only experts that are here count: else a rank with the last ones would copy nothing ahead.
    """
    groups = []
    for layer, state in enumerate(states):
        cuts = [0, *np.flatnonzero(state.here)[size::size].tolist(), len(state.slot_of)]
        for first, stop in itertools.pairwise(cuts):
            runs: list[tuple[int, int, int]] = []
            homes = state.home_of[first:stop][state.away[first:stop]]
            for place, home in enumerate(homes.tolist()):
                if runs and runs[-1][0] + runs[-1][2] == home:
                    runs[-1] = runs[-1][0], runs[-1][1], runs[-1][2] + 1
                else:
                    runs.append((home, place, 1))
            groups.append(Group(layer, first, stop, runs))
    return groups


class Stream:
    """The ring, and where a step is in it."""

    def __init__(self, layers: list[Layer], size: int, device: str) -> None:
        self.layers, self.size, self.device = layers, size, device
        self.copied = 0  # bytes, in all
        self.sections: list[dict[str, Tensor]] = []
        self._cuda = device.startswith("cuda")
        self._copying = torch.cuda.Stream(device) if self._cuda else None
        self._groups: list[Group] = []
        self._addresses = torch.empty(0)
        self._ready: list[Any] = []  # events, one a group
        self._next = 0  # the group to be multiplied next

    def begin(self, states: list[LayerState]) -> None:
        """A long step comes: fill the ring. Until its end, experts stay where they are."""
        if not self.sections:
            sizes = {m: self.layers[0].slots[m].shape[1] for m in MATRICES}
            kind: dict[str, Any] = {"dtype": torch.uint8, "device": self.device}
            self.sections = [
                {m: torch.empty(self.size, width, **kind) for m, width in sizes.items()}
                for _ in range(SECTIONS)
            ]
        self._groups = plan_pass(states, self.size)
        self._addresses = torch.from_numpy(self._places(states)).to(self.device)
        self._restart(0)

    def release(self) -> None:
        """Let others have the ring's memory until the next long step; none is under way."""
        self.sections = []

    def _restart(self, group: int) -> None:
        self._next = group
        self._ready = [None] * len(self._groups)
        for ahead in range(group, min(group + SECTIONS, len(self._groups))):
            self._copy(ahead)

    def _places(self, states: list[LayerState]) -> NDArray[np.int64]:
        """The address of each matrix of each expert during this step: (layers, 3, experts)."""
        each = []
        for layer, state in zip(self.layers, states, strict=True):
            mine = [(i, g) for i, g in enumerate(self._groups) if g.layer == layer.number]
            rows = []
            for m in MATRICES:
                size, row = layer.slots[m].shape[1], layer.addresses(m, state)
                for i, group in mine:
                    away = np.flatnonzero(state.away[group.first : group.stop])
                    base = self.sections[i % SECTIONS][m].data_ptr()
                    row[group.first + away] = base + np.arange(len(away)) * size
                rows.append(row)
            each.append(rows)
        return np.array(each)

    def _copy(self, number: int) -> None:
        """Fill a section with what group `number` lacks, once the section is free."""
        group, section = self._groups[number], self.sections[number % SECTIONS]
        layer = self.layers[group.layer]
        if self._copying is None:
            self._fill(layer, group, section)
            return
        self._copying.wait_stream(torch.cuda.current_stream())  # its last reader has been launched
        with torch.cuda.stream(self._copying):
            self._fill(layer, group, section)
            self._ready[number] = self._copying.record_event()

    def _fill(self, layer: Layer, group: Group, section: dict[str, Tensor]) -> None:
        for home, place, count in group.runs:
            for m in MATRICES:
                whole = layer.homes[m][home : home + count]
                section[m][place : place + count].copy_(whole, non_blocking=True)
                self.copied += whole.numel()

    def groups(self, layer: int) -> Iterator[tuple[int, int, Tensor]]:
        """For each group of a layer: first expert, one past the last, addresses (3, experts).

        They hold until the next group is asked for; by then its kernels must be launched.
        """
        if self._groups[self._next].layer != layer or self._groups[self._next].first:
            self._restart(next(i for i, g in enumerate(self._groups) if g.layer == layer))
        while self._next < len(self._groups) and self._groups[self._next].layer == layer:
            number, group = self._next, self._groups[self._next]
            if self._ready[number] is not None:
                torch.cuda.current_stream().wait_event(self._ready[number])
            yield group.first, group.stop, self._addresses[layer, :, group.first : group.stop]
            self._next += 1
            if number + SECTIONS < len(self._groups):
                self._copy(number + SECTIONS)
        self._next %= len(self._groups)
