"""Cache rows as bytes on the host, and from slot to slot."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ds4.backend import RowRange


class Saving:
    """For rows that have `row_bytes`, `planes`, `export` and `restore`, as PackedRows has."""

    device: str

    def save(self, slot: int, ranges: Sequence[RowRange]) -> NDArray[Any]:
        parts = [r.rows.export(slot, r.start, r.stop).flatten() for r in ranges]
        nothing = torch.zeros(0, dtype=torch.uint8, device=self.device)
        saved: NDArray[Any] = torch.cat([nothing, *parts]).cpu().numpy()
        return saved

    def restore(self, slot: int, ranges: Sequence[RowRange], data: NDArray[Any]) -> None:
        data = np.require(data, requirements="W")  # torch warns of memory that it may not write
        on_device, at = torch.from_numpy(data).to(self.device), 0
        for r in ranges:
            end = at + (r.stop - r.start) * r.rows.row_bytes
            r.rows.restore(slot, r.start, on_device[at:end].view(r.stop - r.start, -1))
            at = end

    def copy(self, source: int, target: int, ranges: Sequence[RowRange]) -> None:
        for r in ranges:
            for plane in r.rows.planes:
                plane[target, r.start : r.stop] = plane[source, r.start : r.stop]
