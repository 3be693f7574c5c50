"""Packed cache rows as bytes on the host, with a launch and a few copies for all of them."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ds4.backend import RowRange

from .kernels.moving import Strip, move
from .saving import Saving
from .staging import Staging


class FastSaving(Saving):
    """For PackedRows on a GPU: how many ranges there are makes little difference."""

    @cached_property
    def _staging(self) -> Staging:
        return Staging(self.device)

    def save(self, slot: int, ranges: Sequence[RowRange]) -> NDArray[Any]:
        strips, nbytes = _strips(slot, ranges)
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        move(buffer, strips, save=True)
        return self._staging.download(buffer)

    def restore(self, slot: int, ranges: Sequence[RowRange], data: NDArray[Any]) -> None:
        strips, _ = _strips(slot, ranges)
        data = np.require(data, requirements="W")  # torch warns of memory that it may not write
        move(self._staging.upload(data), strips, save=False)


def _strips(slot: int, ranges: Sequence[RowRange]) -> tuple[list[Strip], int]:
    """Each part of each range, and how many bytes they are in all."""
    strips, at = [], 0
    for r in ranges:
        rows, within, row = r.stop - r.start, 0, r.rows.row_bytes
        for plane in r.rows.planes:
            width = plane.shape[2] * plane.element_size()
            first = slot * plane.stride(0) + r.start * plane.stride(1)
            address = plane.data_ptr() + first * plane.element_size()
            strips.append(Strip(address, width, rows, at + within, row))
            within += width
        at += rows * row
    return strips, at
