"""Where experts are, as a GPU's kernels read and change it: all layers in a few tensors."""

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .kernel import MOST_TILES, Arguments
from .layer import MATRICES, Layer
from .policy import COUNTS, FADE, NOWHERE, LayerState, set_lent


class Tables:
    """The states of `layers` on the device; row l belongs to layer l."""

    def __init__(self, states: list[LayerState], device: str) -> None:
        self.experts = len(states[0].slot_of)
        most = max(len(s.owner) for s in states)
        pad = [np.pad(s.owner, (0, most - len(s.owner)), constant_values=NOWHERE) for s in states]
        places = [
            np.concatenate([s.slot_of, s.home_of, o]) for s, o in zip(states, pad, strict=True)
        ]
        self.places = torch.from_numpy(np.stack(places)).to(device)  # slot_of, home_of, owner
        self.score = torch.from_numpy(np.stack([s.score for s in states])).to(device)
        tallies = [np.concatenate([s.heat, s.counts]) for s in states]
        self.tallies = torch.from_numpy(np.stack(tallies)).to(device)  # heat, counts
        self.ptrs = torch.zeros(
            len(states), len(MATRICES), self.experts, dtype=torch.int64, device=device
        )
        self.arrived = torch.ones(len(states), self.experts, dtype=torch.int32, device=device)
        self._jobs = torch.zeros(4 + 4 * MOST_TILES, dtype=torch.int32, device=device)
        self._started = torch.zeros(1, dtype=torch.int64, device=device)
        self._sizes = [len(s.owner) for s in states]

    def heat(self, layer: int) -> Tensor:
        return self.tallies[layer, : self.experts]

    def point(self, layer: Layer, matrix: str, state: LayerState) -> Tensor:
        """Fill in and return the addresses of one matrix of a layer's experts."""
        row = self.ptrs[layer.number, MATRICES.index(matrix)]
        row.copy_(torch.from_numpy(layer.addresses(matrix, state)))
        return row

    def set_lent(self, layers: list[Layer], there: bool) -> None:
        """Between steps: slots in lent memory come to be used, or are barred. Waits."""
        places = self.places.cpu()
        states = self._states(places.numpy())
        for layer, state in zip(layers, states, strict=True):
            set_lent(state, layer.kept, there)
        at = [[x.addresses(m, s) for m in MATRICES] for x, s in zip(layers, states, strict=True)]
        self.ptrs.copy_(torch.from_numpy(np.array(at)))
        self.places.copy_(places)

    def arguments(self, layer: Layer) -> Arguments:
        """place.cu's view of a layer whose matrices are all loaded."""
        n, e = layer.number, self.experts
        three = ctypes.c_uint64 * 3
        arenas = [(layer.slots[m], layer.homes[m]) for m in MATRICES]
        row = self.places[n]
        return Arguments(
            three(*(self.ptrs[n, m].data_ptr() for m in range(3))),
            three(*(slots.data_ptr() for slots, _ in arenas)),
            three(*(layer.lent_at[m] for m in MATRICES)),
            three(*(homes.data_ptr() for _, homes in arenas)),
            three(*(slots.shape[1] for slots, _ in arenas)),
            *(row[at:].data_ptr() for at in (0, e, 2 * e)),
            self.score[n].data_ptr(),
            *(self.tallies[n, at:].data_ptr() for at in (0, e)),
            self.arrived[n].data_ptr(),
            self._jobs.data_ptr(),
            self._started.data_ptr(),
            float(FADE),
            e,
            self._sizes[n],
            layer.kept,
        )

    def states(self) -> list[LayerState]:
        """Every layer's state now; waits."""
        return self._states(self.places.cpu().numpy())

    def _states(self, places: NDArray[np.int32]) -> list[LayerState]:
        """With `places` as they are, not a copy."""
        score, tallies = self.score.cpu().numpy(), self.tallies.cpu().numpy()
        e = self.experts
        return [
            LayerState(
                p[:e],
                p[e : 2 * e],
                p[2 * e : 2 * e + size],
                s,
                t[:e],
                t[e : e + COUNTS],
            )
            for p, s, t, size in zip(places, score, tallies, self._sizes, strict=True)
        ]

    def set_homes(self, changes: list[tuple[int, int, int]]) -> None:
        """home_of[layer, expert] = home for each (layer, expert, home), between steps."""
        if changes:
            layer, expert, home = (
                torch.tensor(x, device=self.places.device) for x in zip(*changes, strict=True)
            )
            self.places[layer, self.experts + expert] = home.int()

    def prompt(self, layer: int, pairs: Tensor, tokens: int) -> None:
        """Count the pairs (E,) of a long step, as policy.prompt_score does."""
        kept = float(FADE**tokens)
        self.heat(layer).add_(pairs)
        self.score[layer].mul_(kept).add_(pairs, alpha=(1 - kept) / (1 - float(FADE)) / tokens)
