"""The experts of one layer, each matrix in slots on the GPU and homes in host memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .lent import Lent
from .policy import BARRED, NOWHERE, LayerState

MATRICES = ("w1", "w3", "w2")
Take = Callable[..., Tensor]


class Layer:
    """Arenas of bytes: slots[m][s] is matrix m of the expert in slot s, homes[m][h] in home h.

    The slots from number `kept` on are in memory that is `lent`, from lent_at[m] on. `state` says
    which is where when loading; on a GPU it is afterwards in `Tables`.
    """

    def __init__(
        self,
        number: int,
        state: LayerState,
        device: str,
        expert_bytes: int = 0,
        lent: Lent | None = None,
    ) -> None:
        self.number, self.state, self.device, self._lent = number, state, device, lent
        self.kept = int((state.owner != BARRED).sum())
        self.lent_at = dict.fromkeys(MATRICES, 0)
        self._lent_slots: dict[str, Tensor | None] = {}
        # before the weights come: what they need on their way would leave holes between slots
        size = self.kept * expert_bytes
        self._room = torch.empty(size, dtype=torch.uint8, device=device)
        self.held = np.flatnonzero(state.here)  # which experts the stacks to come have
        self.slots: dict[str, Tensor] = {}
        self.homes: dict[str, Tensor] = {}

    def fill(self, matrix: str, blob: Tensor, take: Take) -> None:
        """Keep uint8 (held, bytes), a matrix of each expert: in slots, and in what `take` gives."""
        owners = self.state.owner[: self.kept]
        owner = torch.from_numpy(np.searchsorted(self.held, owners)).to(blob.device)
        slots = self._take(len(owner), blob.shape[1])
        torch.index_select(blob, 0, owner, out=slots)
        count = int((self.state.home_of != NOWHERE).sum())
        homes = take(count, blob.shape[1])
        for first, stop, home in self._runs():
            homes[home : home + stop - first].copy_(blob[first:stop], non_blocking=True)
        self.slots[matrix], self.homes[matrix] = slots, homes
        if self._lent is not None:
            more = len(self.state.owner) - self.kept
            self.lent_at[matrix], self._lent_slots[matrix] = self._lent.part(more, blob.shape[1])

    def addresses(self, matrix: str, state: LayerState) -> NDArray[np.int64]:
        """Where each expert's matrix is, if `state` is how things are."""
        slot, size = state.slot_of.astype(np.int64), self.slots[matrix].shape[1]
        in_kept = self.slots[matrix].data_ptr() + slot * size
        in_lent = self.lent_at[matrix] + (slot - self.kept) * size
        in_homes = self.homes[matrix].data_ptr() + state.home_of.astype(np.int64) * size
        here = np.where(slot < self.kept, in_kept, in_lent)
        return np.where(slot == NOWHERE, in_homes, here)

    def slot(self, matrix: str, number: int) -> Tensor:
        """The bytes of a slot: for the CPU, or if it is kept."""
        if number < self.kept:
            return self.slots[matrix][number]
        lent = self._lent_slots[matrix]
        assert lent is not None
        return lent[number - self.kept]

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
                self.slot(m, slot).copy_(self.homes[m][home])

    def copy_out(self, slot: int, home: int) -> None:
        """From a slot to a home, on the current stream."""
        for m in MATRICES:
            self.homes[m][home].copy_(self.slots[m][slot], non_blocking=True)

    def expert(self, matrix: str, number: int) -> Tensor:
        """The bytes of one expert's matrix, wherever they are: for the CPU."""
        slot, home = self.state.slot_of[number], self.state.home_of[number]
        return self.homes[matrix][home] if slot == NOWHERE else self.slot(matrix, slot)


class PlacedStack:
    """One matrix of a layer's experts for PyTorch's plain operations: reads like a stack."""

    def __init__(self, layer: Layer, matrix: str, like: Tensor) -> None:
        self.tier, self.matrix = layer, matrix
        self._kind, self._shape = like.dtype, like.shape[1:]

    def __getitem__(self, ids: Any) -> Tensor:
        each = [self.tier.expert(self.matrix, int(self.tier.held[i])) for i in ids]
        return torch.stack(each).view(self._kind).view(-1, *self._shape)
