"""GPU memory that holds more experts while no prompt is run.

A long step needs working memory and a ring, some GB; short steps do not, and have it for experts
meanwhile. Its addresses stay the same, which recorded graphs need: they are reserved once, and
memory is put behind them and taken away again by the driver.
"""

import contextlib
import ctypes
from typing import Any

import torch
from torch import Tensor

from ds4.errors import BackendError

from .pinned import driver

PIECE = 64 << 20  # bytes that are put behind the addresses at once; of whole pages
_PINNED, _DEVICE, _READ_AND_WRITE = 1, 1, 3  # the driver's numbers


class _Location(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int),
        ("handles", ctypes.c_int),
        ("location", _Location),
        ("windows", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class Lent:
    """`nbytes` of addresses on a device; `there` says whether there is memory behind them.

    On a CPU there always is, and what was in it is lost all the same.
    """

    def __init__(self, nbytes: int, device: str) -> None:
        self.there, self._used = False, 0
        self._cuda = device.startswith("cuda")
        self._memory: Tensor | None = None
        if not self._cuda:
            self._memory = torch.zeros(nbytes, dtype=torch.uint8)
            self.address = self._memory.data_ptr()
            return
        self._where = _Location(_DEVICE, torch.device(device).index or 0)
        self._size = -(-nbytes // PIECE) * PIECE
        address, zero = ctypes.c_uint64(), ctypes.c_uint64(0)
        size = ctypes.c_size_t(self._size)
        _check(driver().cuMemAddressReserve, ctypes.byref(address), size, zero, zero, zero)
        self.address = address.value
        self._pieces: list[ctypes.c_uint64] = []

    def part(self, count: int, size: int) -> tuple[int, Tensor | None]:
        """Where `count` times `size` bytes are that nobody else has; a view of them, on a CPU."""
        first, self._used = self._used, self._used + count * size
        if self._memory is None:
            return self.address + first, None
        return self.address + first, self._memory[first : self._used].view(count, size)

    def take(self) -> bool:
        """Have memory, with any contents. False if there is not enough now."""
        try:
            while self._cuda and len(self._pieces) * PIECE < self._size:
                self._add()
        except BackendError:
            self.give()
            return False
        if self._cuda:
            access = _Access(self._where, _READ_AND_WRITE)
            size = ctypes.c_size_t(self._size)
            place, one = ctypes.c_uint64(self.address), ctypes.c_size_t(1)
            _check(driver().cuMemSetAccess, place, size, ctypes.byref(access), one)
        self.there = True
        return True

    def _add(self) -> None:
        handle = ctypes.c_uint64()
        wanted = _Properties(_PINNED, 0, self._where)
        size, at = ctypes.c_size_t(PIECE), self.address + len(self._pieces) * PIECE
        made = ctypes.byref(handle), size, ctypes.byref(wanted), ctypes.c_uint64(0)
        _check(driver().cuMemCreate, *made)
        none = ctypes.c_size_t(0), handle, ctypes.c_uint64(0)
        try:
            _check(driver().cuMemMap, ctypes.c_uint64(at), size, *none)
        except BackendError:
            driver().cuMemRelease(handle)
            raise
        self._pieces.append(handle)

    def give(self) -> None:
        """Let others have the memory. What used it must have ended."""
        self.there = False
        if self._memory is not None:
            self._memory.fill_(171)
            return
        for i, handle in enumerate(self._pieces):
            at = ctypes.c_uint64(self.address + i * PIECE)
            driver().cuMemUnmap(at, ctypes.c_size_t(PIECE))
            driver().cuMemRelease(handle)
        self._pieces = []

    def __del__(self) -> None:
        if self._cuda:
            with contextlib.suppress(Exception):  # the driver may be gone
                self.give()
                size = ctypes.c_size_t(self._size)
                driver().cuMemAddressFree(ctypes.c_uint64(self.address), size)


def _check(call: Any, *given: Any) -> None:
    if failed := call(*given):
        raise BackendError(f"the driver does not lend memory: {call.__name__}, error {failed}")
