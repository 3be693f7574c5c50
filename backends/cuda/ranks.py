"""Ranks over torch.distributed: sums by NCCL between GPUs, by gloo on CPUs.

Ranks that share a GPU sum through the host, since NCCL needs a GPU a rank; their steps are not
recorded as CUDA graphs. NCCL takes what links there are; GeForce cards have no peer-to-peer, and it
goes through host memory.
"""

import functools
import os
import zlib
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from ds4.errors import BackendError
from ds4.parallel.crew import Crew, Follower, Lead
from ds4.parallel.launch import LOOPBACK, current
from ds4.ranks import Alone

from .nvrtc import compiling

_NEVER = timedelta(days=365)  # a follower waits for work as long as it takes
# PyTorch's own watch over NCCL would abort the process before the crew says which rank has died
_ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


class Group:
    """This process among the ranks of a model, each on a device."""

    def __init__(self, crew: Crew, device: str) -> None:
        self.crew, self.rank, self.size, self.device = crew, crew.rank, crew.size, device
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if crew.seat.address == LOOPBACK:
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(name, "lo")
        store = _store(crew)
        rank, size = self.rank, self.size
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_NEVER)
        self.nccl: Any = None
        if device.startswith("cuda"):
            torch.cuda.set_device(device)  # so that nothing of this rank lies on another's
        if self._own_gpus(device):
            self.nccl = dist.new_group(backend="nccl", timeout=_NEVER)
            self.all_sum(torch.zeros(1, device=device))  # connects
            torch.cuda.synchronize()
        self._graphs: WeakSet[Any] = WeakSet()
        crew.at_end(self._leave)

    def keep(self, graphs: Any) -> None:
        """These graph.Graphs hold sums: NCCL does not end before they do."""
        self._graphs.add(graphs)

    def _leave(self) -> None:
        if self.nccl is not None:
            torch.cuda.synchronize(self.device)
            for graphs in list(self._graphs):
                graphs.forget()
        dist.destroy_process_group()

    @property
    def recordable(self) -> bool:
        """Whether a CUDA graph may contain a sum."""
        return self.nccl is not None

    def all_sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, in place."""
        if compiling.get() is not None:  # nothing is to be run, see ahead.py
            return x
        try:
            if self.nccl is not None:
                dist.all_reduce(x, group=self.nccl)
            elif x.is_cuda:
                host = x.cpu()
                dist.all_reduce(host)
                x.copy_(host)
            else:
                dist.all_reduce(x)
        except RuntimeError as error:
            self.crew.lost(error)
        return x

    def from_first(self, x: Tensor) -> Tensor:
        """Rank 0's `x`, int32 on every rank's device; of the others its shape counts."""
        x = x.to(torch.int32)
        try:
            if self.nccl is not None:
                dist.broadcast(x, 0, group=self.nccl)
            elif x.is_cuda:
                host = x.cpu()
                dist.broadcast(host, 0)
                x.copy_(host)
            else:
                dist.broadcast(x, 0)
        except RuntimeError as error:
            self.crew.lost(error)
        return x

    def _own_gpus(self, device: str) -> bool:
        """Whether every rank has a GPU of its own."""
        place = torch.device(device)
        index = place.index if place.type == "cuda" else -1
        here = torch.tensor([zlib.crc32(os.uname().nodename.encode()), index])
        every = [torch.empty_like(here) for _ in range(self.size)]
        dist.all_gather(every, here)
        places = {(int(host), int(gpu)) for host, gpu in every}
        return len(places) == self.size and all(gpu >= 0 for _, gpu in places)


def join(device: str) -> Group | Alone:
    """The ranks that this process belongs to, and `device` as its place; alone if there are none.

    Raises BackendError if they cannot be joined.
    """
    crew = current()
    return Alone() if crew is None else _join(crew, device)


@functools.cache
def _join(crew: Crew, device: str) -> Group:
    return Group(crew, device)


def own_device(device: str) -> str:
    """Of the GPUs of this host, the one of this rank, unless one is named."""
    crew = current()
    if crew is None or device not in ("cuda", "auto") or not torch.cuda.is_available():
        return device
    gpus, ranks = torch.cuda.device_count(), crew.seat.local_size
    if ranks > gpus:
        raise BackendError(
            f"{ranks} ranks on this host, which has {gpus} GPU{'s' * (gpus > 1)}: use --gpus "
            f"{gpus}, or --device cuda:0 for ranks that share it"
        )
    return f"cuda:{crew.seat.local_rank}"


def _store(crew: Crew) -> dist.Store:
    """Where the ranks find each other: rank 0 opens it and tells the others its port."""
    address, size, wait = crew.seat.address, crew.size, timedelta(seconds=120)
    if isinstance(crew, Lead):
        store = dist.TCPStore(address, 0, size, True, wait, wait_for_workers=False)
        crew.tell({"do": "meet", "port": store.port})
        return store
    assert isinstance(crew, Follower)
    said = crew.next()
    if not isinstance(said, dict) or said.get("do") != "meet":
        raise BackendError("rank 0 said something else than where the ranks meet")
    return dist.TCPStore(address, said["port"], size, False, wait, wait_for_workers=False)
