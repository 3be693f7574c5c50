"""Many bytes between ordinary host memory and the GPU, through a little that is pinned.

What is pinned moves at the bus's speed and by itself: so pieces are copied by a few threads while
others are on the bus. The threads are our own: PyTorch's would wait for each other at every piece,
which on a host that others use, too, takes longer than the copies.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECE = 4 << 20
PIECES = 8
COPIED = 4  # of them at once, by a thread each


def pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class Staging:
    """For one thread."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._pinned = [pinned(PIECE) for _ in range(PIECES)]
        self._done = [torch.cuda.Event() for _ in range(PIECES)]
        self._threads = ThreadPoolExecutor(COPIED, "ds4-staging")

    def upload(self, data: NDArray[Any]) -> Tensor:
        """uint8 (n,) on the device; `data` may be altered afterwards."""
        out = torch.empty(len(data), dtype=torch.uint8, device=self._device)
        copying: deque[tuple[int, Future[None]]] = deque()

        def send() -> None:
            number, copied = copying.popleft()
            copied.result()
            part = out[number * PIECE : (number + 1) * PIECE]
            part.copy_(self._place(number, len(part)), non_blocking=True)
            self._done[number % PIECES].record()

        for number in range(-(-len(data) // PIECE)):
            if len(copying) == COPIED:
                send()
            part = data[number * PIECE : (number + 1) * PIECE]
            self._done[number % PIECES].synchronize()
            place = self._place(number, len(part)).numpy()
            copying.append((number, self._threads.submit(np.copyto, place, part)))
        while copying:
            send()
        return out

    def download(self, x: Tensor) -> NDArray[Any]:
        """uint8 (n,) on the host: waits for it."""
        out = np.empty(len(x), np.uint8)
        copying: deque[Future[None]] = deque()

        def keep(number: int) -> None:
            part = out[number * PIECE : (number + 1) * PIECE]
            self._done[number % PIECES].synchronize()
            np.copyto(part, self._place(number, len(part)).numpy())

        for number in range(-(-len(x) // PIECE)):
            if len(copying) == PIECES:
                copying.popleft().result()
            part = x[number * PIECE : (number + 1) * PIECE]
            self._place(number, len(part)).copy_(part, non_blocking=True)
            self._done[number % PIECES].record()
            copying.append(self._threads.submit(keep, number))
        for copied in copying:
            copied.result()
        return out

    def _place(self, number: int, size: int) -> Tensor:
        return self._pinned[number % PIECES][:size]
