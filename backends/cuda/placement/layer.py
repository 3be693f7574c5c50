"""The experts of one layer, each matrix in slots on the GPU and homes in host memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .policy import NOWHERE, LayerState

MATRICES = ("w1", "w3", "w2")
Take = Callable[..., Tensor]


class Layer:
    """Arenas of bytes: slots[m][s] is matrix m of the expert in slot s, homes[m][h] in home h.

    `state` says which is where when loading; on a GPU it is afterwards in `Tables`.
    """

    def __init__(self, number: int, state: LayerState, device: str, expert_bytes: int = 0) -> None:
        self.number, self.state, self.device = number, state, device
        # before the weights come: what they need on their way would leave holes between slots
        size = len(state.owner) * expert_bytes
        self._room = torch.empty(size, dtype=torch.uint8, device=device)
        self.held = np.flatnonzero(state.here)  # which experts the stacks to come have
        self.slots: dict[str, Tensor] = {}
        self.homes: dict[str, Tensor] = {}

    def fill(self, matrix: str, blob: Tensor, take: Take) -> None:
        """Keep uint8 (held, bytes), a matrix of each expert: in slots, and in what `take` gives."""
        owner = torch.from_numpy(np.searchsorted(self.held, self.state.owner)).to(blob.device)
        slots = self._take(len(owner), blob.shape[1])
        torch.index_select(blob, 0, owner, out=slots)
        count = int((self.state.home_of != NOWHERE).sum())
        homes = take(count, blob.shape[1])
        for first, stop, home in self._runs():
            homes[home : home + stop - first].copy_(blob[first:stop], non_blocking=True)
        self.slots[matrix], self.homes[matrix] = slots, homes

    def _take(self, count: int, size: int) -> Tensor:
        """Slots of `size` bytes, of the room that was kept for them."""
        if len(self._room) < count * size:
            return torch.empty(count, size, dtype=torch.uint8, device=self.device)
        slots, self._room = self._room.split([count * size, len(self._room) - count * size])
        return slots.view(count, size)

    def _runs(self) -> list[tuple[int, int, int]]:
        """Neighbours of the stack in neighbouring homes: first, one past the last, home."""
        runs: list[tuple[int, int, int]] = []
        for expert, home in enumerate(self.state.home_of[self.held].tolist()):
            if home == NOWHERE:
                continue
            if runs and runs[-1][1] == expert and runs[-1][2] + expert - runs[-1][0] == home:
                runs[-1] = runs[-1][0], expert + 1, runs[-1][2]
            else:
                runs.append((expert, expert + 1, home))
        return runs

    @property
    def expert_bytes(self) -> int:
        return sum(self.slots[m].shape[1] for m in MATRICES)

    def copy_in(self, jobs: list[tuple[int, int]]) -> None:
        """From homes to slots, now."""
        for home, slot in jobs:
            for m in MATRICES:
                self.slots[m][slot].copy_(self.homes[m][home])

    def copy_out(self, slot: int, home: int) -> None:
        """From a slot to a home, on the current stream."""
        for m in MATRICES:
            self.homes[m][home].copy_(self.slots[m][slot], non_blocking=True)

    def expert(self, matrix: str, number: int) -> Tensor:
        """The bytes of one expert's matrix, wherever they are: for the CPU."""
        slot, home = self.state.slot_of[number], self.state.home_of[number]
        found = self.homes[matrix][home] if slot == NOWHERE else self.slots[matrix][slot]
        return found


class PlacedStack:
    """One matrix of a layer's experts for PyTorch's plain operations: reads like a stack."""

    def __init__(self, layer: Layer, matrix: str, like: Tensor) -> None:
        self.tier, self.matrix = layer, matrix
        self._kind, self._shape = like.dtype, like.shape[1:]

    def __getitem__(self, ids: Any) -> Tensor:
        each = [self.tier.expert(self.matrix, int(self.tier.held[i])) for i in ids]
        return torch.stack(each).view(self._kind).view(-1, *self._shape)
