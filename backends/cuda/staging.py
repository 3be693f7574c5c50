"""Many bytes between ordinary host memory and the GPU, through a little that is pinned.

What is pinned moves at the bus's speed and by itself: so one piece is copied by the host while the
one before is on the bus.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

PIECE = 8 << 20
PIECES = 4


class Staging:
    """For one thread."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._pinned = [
            torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(PIECES)
        ]
        self._done = [torch.cuda.Event() for _ in range(PIECES)]

    def upload(self, data: NDArray[Any]) -> Tensor:
        """uint8 (n,) on the device; `data` may be altered afterwards."""
        host = torch.from_numpy(data)
        out = torch.empty(len(host), dtype=torch.uint8, device=self._device)
        for number, start in enumerate(range(0, len(host), PIECE)):
            part = host[start : start + PIECE]
            pinned, done = self._pinned[number % PIECES][: len(part)], self._done[number % PIECES]
            done.synchronize()
            pinned.copy_(part)
            out[start : start + PIECE].copy_(pinned, non_blocking=True)
            done.record()
        return out

    def download(self, x: Tensor) -> NDArray[Any]:
        """uint8 (n,) on the host: waits for it."""
        out = torch.empty(len(x), dtype=torch.uint8)
        count = -(-len(x) // PIECE)

        def finish(number: int) -> None:
            part = out[number * PIECE : (number + 1) * PIECE]
            self._done[number % PIECES].synchronize()
            part.copy_(self._pinned[number % PIECES][: len(part)])

        for number in range(count):
            if number >= PIECES:
                finish(number - PIECES)
            part = x[number * PIECE : (number + 1) * PIECE]
            self._pinned[number % PIECES][: len(part)].copy_(part, non_blocking=True)
            self._done[number % PIECES].record()
        for number in range(max(0, count - PIECES), count):
            finish(number)
        host: NDArray[Any] = out.numpy()
        return host
