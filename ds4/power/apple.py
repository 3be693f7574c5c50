"""Macs: what the chip counts (IOReport) and what the whole machine takes (the SMC's key PSTR).

Neither could be run where this was written: only the SMC's message format and the adding up are
tested, with a stand-in for the system's calls. Both are private interfaces, and need no root.
"""

import ctypes
import ctypes.util
import platform
import struct
import subprocess
from collections.abc import Callable
from typing import Any

from ..errors import PowerError
from .source import Reading, Scope

_PARTS = "cpu_total_mj", "gpu_mj", "gpu_sram_mj", "dram_mj", "ane_mj"


class SocCounters:
    """CPU, GPU, memory and neural engine of an Apple chip; no display, SSD, fans or supply."""

    name = "ioreport:soc"
    scope: Scope = "chip"
    part = "soc"
    interval_s = refresh_s = 0.1
    wrap_j: float | None = None

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor
        self.read()

    def read(self) -> Reading:
        try:
            told = self._monitor.get_cumulative_energy()
        except RuntimeError as error:  # what its C++ throws
            raise PowerError(f"ioreport: {error}") from error
        values = [getattr(told, part, None) for part in _PARTS]
        if values[0] is None or values[1] is None:
            raise PowerError("ioreport: this chip does not count the energy of its CPU and GPU")
        return Reading(joules=sum(value or 0 for value in values) / 1e3)

    def close(self) -> None:
        """The monitor ends with the process."""


def soc() -> SocCounters:
    """This Mac's chip. Raises PowerError where it cannot be read or would be read wrongly."""
    _need_mac("ioreport")
    if "Ultra" in _chip():
        raise PowerError(
            "ioreport: zeus-apple-silicon 1.1 counts one of the two dies of an Ultra: use smc"
        )
    try:
        from zeus_apple_silicon import AppleEnergyMonitor
    except ImportError as error:
        raise PowerError(
            "ioreport: zeus-apple-silicon is missing: pip install 'ds4[power]'"
        ) from error
    try:
        return SocCounters(AppleEnergyMonitor())
    except RuntimeError as error:
        raise PowerError(f"ioreport: {error}") from error


# the SMC

_COMMAND = struct.Struct("=I6s2x16sIIB3xBBBxI32s")  # SMCKeyData_t, 80 bytes
_CALL, _INFO, _READ = 2, 9, 5  # the driver's method; what is asked of it
_Call = Callable[[bytes], bytes]


class SmcTotal:
    """The power of the whole Mac behind its supply, refreshed about every second."""

    name = "smc:PSTR"
    scope: Scope = "dc-system"
    part = "system"
    interval_s = 0.5
    refresh_s = 1.0
    wrap_j: float | None = None

    def __init__(self, call: _Call, close: Callable[[], None] = lambda: None) -> None:
        self._call, self._close = call, close
        self.read()

    def read(self) -> Reading:
        return Reading(watts=read_float(self._call, "PSTR"))

    def close(self) -> None:
        self._close()


def read_float(call: _Call, key: str) -> float:
    """The value of a key of type `flt `. Raises PowerError if the SMC has no such key."""
    size, kind = _ask(call, key, _INFO)[:2]
    if (size, kind) != (4, _code("flt ")):
        raise PowerError(f"smc: {key} is no float of 4 bytes")
    value: float = struct.unpack("<f", _ask(call, key, _READ, size)[2][:4])[0]
    return value


def _ask(call: _Call, key: str, command: int, size: int = 0) -> tuple[int, int, bytes]:
    """Size and type of a key, and its bytes."""
    sent = _COMMAND.pack(_code(key), bytes(6), bytes(16), size, 0, 0, 0, 0, command, 0, bytes(32))
    fields = _COMMAND.unpack(call(sent))
    if fields[6]:
        raise PowerError(f"smc: key {key} cannot be read, code {fields[6]}")
    return fields[3], fields[4], fields[10]


def _code(text: str) -> int:
    return int.from_bytes(text.encode("ascii"), "big")


def smc() -> SmcTotal:
    """This Mac's total. Raises PowerError where there is none."""
    _need_mac("smc")
    iokit = ctypes.CDLL(ctypes.util.find_library("IOKit"))
    iokit.IOServiceMatching.restype = ctypes.c_void_p
    iokit.IOServiceGetMatchingService.argtypes = ctypes.c_uint, ctypes.c_void_p
    iokit.IOServiceOpen.argtypes = (ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p)
    iokit.IOConnectCallStructMethod.argtypes = (
        *(ctypes.c_uint, ctypes.c_uint, ctypes.c_char_p, ctypes.c_size_t),
        *(ctypes.c_void_p, ctypes.c_void_p),
    )
    service = iokit.IOServiceGetMatchingService(0, iokit.IOServiceMatching(b"AppleSMC"))
    port, task = ctypes.c_uint(), ctypes.c_uint.in_dll(ctypes.CDLL(None), "mach_task_self_")
    if not service or iokit.IOServiceOpen(service, task, 0, ctypes.byref(port)):
        raise PowerError("smc: AppleSMC cannot be opened")
    iokit.IOObjectRelease(service)

    def call(sent: bytes) -> bytes:
        answer = ctypes.create_string_buffer(_COMMAND.size)
        length = ctypes.c_size_t(_COMMAND.size)
        failed = iokit.IOConnectCallStructMethod(
            port, _CALL, sent, len(sent), answer, ctypes.byref(length)
        )
        if failed:
            raise PowerError(f"smc: the call failed with {failed:#x}")
        return answer.raw

    return SmcTotal(call, lambda: iokit.IOServiceClose(port))


def _need_mac(name: str) -> None:
    if platform.system() != "Darwin" or platform.machine() != "arm64":
        raise PowerError(f"{name}: Macs with Apple Silicon only")


def _chip() -> str:
    command = "sysctl", "-n", "machdep.cpu.brand_string"
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
