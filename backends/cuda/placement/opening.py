"""Whether a model needs two memories on this machine now, and how much of each there is."""

from pathlib import Path

import torch

from ds4.errors import BackendError
from ds4.plan.placement import Need, divide, fits_whole

from .pinned import free_host_bytes
from .placement import Placement

HOST_MARGIN = 6 * 10**9  # bytes left to the system, and to tensors on their way


def open_placement(
    need: Need, device: str, gpu_memory: int | None, chunk: int, heat_map: Path | None
) -> Placement | None:
    """None if every expert fits in `gpu_memory` bytes, or in what is free.

    Raises BackendError before anything is loaded if the two memories together are too small.
    """
    free, total = torch.cuda.mem_get_info(device)
    if gpu_memory is not None and gpu_memory > free:
        raise BackendError(
            f"{device}: {free / 1e9:.1f} GB of {total / 1e9:.1f} are free, fewer than the "
            f"{gpu_memory / 1e9:.1f} GB asked for: another process has the rest (nvidia-smi), "
            "end it or give a smaller --gpu-memory"
        )
    limit = free if gpu_memory is None else gpu_memory
    if fits_whole(need, limit, min(chunk, need.context)):
        return None
    budget = divide(need, limit, max(0, free_host_bytes() - HOST_MARGIN))
    return Placement(budget, device, heat_map)
