"""Whether a model needs two memories on this machine now, and how much of each there is."""

import os
from pathlib import Path
from typing import Any

import torch

from ds4.errors import BackendError
from ds4.plan.placement import Need, divide, fits_whole

from .pinned import free_host_bytes
from .placement import Placement

HOST_MARGIN = 10 * 10**9  # bytes left to the system, and to tensors on their way


def open_placement(
    need: Need, be: Any, gpu_memory: int | None, heat_map: Path | None, host_memory: int | None
) -> Placement | None:
    """None if every expert of this rank fits in `gpu_memory` bytes, or in what is free.

    `host_memory` bytes are shared by all ranks of this host; None: what is free.

    Raises BackendError before anything is loaded if the two memories together are too small.
    """
    device = be.device
    free, total = torch.cuda.mem_get_info(device)
    if gpu_memory is not None and gpu_memory > free:
        raise BackendError(
            f"{device}: {free / 1e9:.1f} GB of {total / 1e9:.1f} are free, fewer than the "
            f"{gpu_memory / 1e9:.1f} GB asked for: another process has the rest (nvidia-smi), "
            "end it or give a smaller --gpu-memory"
        )
    limit = free if gpu_memory is None else gpu_memory
    if fits_whole(need, limit, min(be.max_chunk, need.context)):
        return None
    ranks = be.ranks.size
    host = _host_share(ranks) if host_memory is None else host_memory // ranks
    budget = divide(need, limit, host)
    _take_pages()
    layers, experts = range(need.cfg.num_hidden_layers), need.cfg.n_routed_experts
    held = None if ranks == 1 else [be.holds(layer, experts) for layer in layers]
    return Placement(budget, device, heat_map, held)


def _take_pages() -> None:
    """Let PyTorch take memory of the GPU in pages. In blocks of 20 MB and more, of which a part may
    be free and yet nobody else's, it holds 1 GB more."""
    name = "_accelerator_setAllocatorSettings"  # torch 2.9 and later
    setting = getattr(torch._C, name, None) or torch.cuda.memory._set_allocator_settings
    setting("expandable_segments:True")


def _host_share(ranks: int) -> int:
    """Bytes of host memory for one of so many processes, others having taken theirs or not."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = free_host_bytes() if ranks == 1 else min(free_host_bytes(), total // ranks)
    return max(0, free - HOST_MARGIN)
