"""Host memory that a GPU reads: large blocks, made by several threads at once.

One thread pins 1.6 GB/s, which is a minute for 100 GB. Most of that is the kernel finding and
clearing pages, and that many threads can do; so a block is touched first, in huge pages, then
registered with the driver.
"""

import contextlib
import ctypes
import functools
import mmap
import os
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds4.errors import BackendError

HUGE = 2 << 20  # bytes of a huge page
_FILE_PAGES = "active", "inactive"
_PORTABLE_AND_MAPPED = 3  # CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP


class PinnedPool:
    """Blocks of so many bytes, made in the background; `take` hands out parts of them.

    `device` "cpu": ordinary memory. `nbytes` were taken so far; the last block was there after
    `seconds`.
    """

    def __init__(self, sizes: Sequence[int], device: str, threads: int = 0) -> None:
        self.device = device
        self.nbytes, self.seconds = 0, 0.0
        self._left = [-(-size // HUGE) * HUGE for size in sizes]
        self._threads = ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1))
        self._began = time.perf_counter()
        self._making = [self._start(size) for size in self._left]
        self._block: Tensor | None = None
        self._used = 0

    def take(self, *shape: int) -> Tensor:
        """A uint8 tensor of this shape. Raises BackendError if the memory cannot be pinned."""
        nbytes = int(np.prod(shape))
        if self._block is None or self._used + nbytes > len(self._block):
            self._block, self._used = self._next(nbytes), 0
        part = self._block[self._used : self._used + nbytes]
        self._used += -(-nbytes // 256) * 256
        return part.view(shape)

    def _next(self, nbytes: int) -> Tensor:
        if not self._making or self._left[0] < nbytes:
            self._left.insert(0, -(-nbytes // HUGE) * HUGE)
            self._making.insert(0, self._start(self._left[0]))
        self._left.pop(0)
        block = self._making.pop(0).result()
        self.nbytes += len(block)
        return block

    def _start(self, size: int) -> "Future[Tensor]":
        """A block in the making: by one thread, since a copy must not cross two."""
        if size and self.device.startswith("cuda"):
            block = self._threads.submit(_pinned, size, self.device)
        else:
            block = self._threads.submit(lambda: torch.empty(size, dtype=torch.uint8))
        block.add_done_callback(self._made)
        return block

    def _made(self, block: "Future[Tensor]") -> None:
        self.seconds = time.perf_counter() - self._began


def _pinned(size: int, device: str) -> Tensor:
    """A block: huge pages, touched, then registered; or, where that cannot be, the driver's own."""
    torch.cuda.set_device(device)
    torch.cuda.mem_get_info(device)  # a thread has no context until the runtime is asked something
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    block = whole[-whole.ctypes.data % HUGE :][:size]
    address = ctypes.c_void_p(block.ctypes.data)
    ctypes.memset(address, 0, size)  # without the interpreter's lock
    mapped = ctypes.c_size_t(size), _PORTABLE_AND_MAPPED
    if driver().cuMemHostRegister_v2(address, *mapped) == 0:
        release = driver().cuMemHostUnregister
    else:
        del whole, block
        memory.close()
        address = ctypes.c_void_p()
        failed = driver().cuMemHostAlloc(ctypes.byref(address), *mapped)
        if failed:
            raise BackendError(
                f"the driver could not pin {size / 1e9:.1f} GB of host memory (error {failed}): "
                "raise the limit of locked memory (ulimit -l), or take a smaller recipe"
            )
        array: Any = (ctypes.c_uint8 * size).from_address(address.value or 0)
        whole = block = np.frombuffer(array, np.uint8)
        release = driver().cuMemFreeHost
    weakref.finalize(whole, release, address).atexit = False  # before its pages are given back
    return torch.from_numpy(block)


@functools.cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def free_host_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: of the machine, and of its control groups."""
    free = _field(root / "proc/meminfo", "MemAvailable:", 1024)
    if free is None:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for group in _groups(root):
        most, now = _number(group / "memory.max"), _number(group / "memory.current")
        if most is not None and now is not None:
            # pages of files that were read are given back when memory is asked for
            kept = sum(_field(group / "memory.stat", f"{x}_file", 1) or 0 for x in _FILE_PAGES)
            free = min(free, most - now + kept)
    return max(free, 0)


def _groups(root: Path) -> list[Path]:
    """The control groups (version 2) that this process is in: its own, and those around it."""
    top = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                own = top / line[4:]
                return [own, *own.parents[: len(own.relative_to(top).parts)]]
    return [top]


def _field(file: Path, name: str, unit: int) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(name)]
    return int(found[0]) * unit if found else None


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
