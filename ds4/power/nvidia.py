"""NVIDIA GPUs, by NVML: a counter of millijoules, and the power of this instant, of each board."""

import ctypes
import os
from collections.abc import Iterator
from typing import Any

from ..errors import PowerError
from .source import Reading, Scope


class NvmlGpu:
    """One GPU, its memory and its regulators; not the machine around it.

    The counter takes a new value about every 100 ms. `power.draw` averages a second on recent
    cards, so the instant value is read where there is one.
    """

    scope: Scope = "chip"
    part = "gpu"
    interval_s = refresh_s = 0.1
    wrap_j: float | None = None

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        name, index = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetIndex(handle)
        self.name = f"nvml:{index} {name.decode() if isinstance(name, bytes) else name}"
        self._has_counter = self._counter() is not None
        if not self._has_counter and self._watts() is None:
            raise PowerError(f"{self.name}: the driver tells neither energy nor power")

    def read(self) -> Reading:
        joules = self._counter() if self._has_counter else None
        watts = self._watts()
        if (self._has_counter and joules is None) or (joules is None and watts is None):
            raise PowerError(f"{self.name} does not answer")
        return Reading(watts, joules)

    def _counter(self) -> float | None:
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError:
            return None

    def _watts(self) -> float | None:
        nvml = self._nvml
        try:
            said = nvml.nvmlDeviceGetFieldValues(self._handle, [nvml.NVML_FI_DEV_POWER_INSTANT])[0]
            if said.nvmlReturn == nvml.NVML_SUCCESS:
                return float(said.value.uiVal) / 1e3
        except (nvml.NVMLError, AttributeError):
            pass
        try:
            return float(nvml.nvmlDeviceGetPowerUsage(self._handle)) / 1e3
        except nvml.NVMLError:
            return None

    def close(self) -> None:
        """NVML stays open for the process."""


def nvidia() -> list[NvmlGpu]:
    """The GPUs that this process may use, in CUDA's order; without a limit, all of the machine.

    Of a MIG instance the whole board is read: NVML knows no smaller part. Raises PowerError if
    there is none.
    """
    try:
        import pynvml as nvml
    except ImportError as error:
        raise PowerError("nvml: nvidia-ml-py is missing: pip install 'ds4[power]'") from error
    try:
        nvml.nvmlInit()
        if os.environ.get("CUDA_VISIBLE_DEVICES") is None:
            count = nvml.nvmlDeviceGetCount()
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        else:
            boards = dict.fromkeys(_bus_ids())  # of several MIG instances once
            handles = [nvml.nvmlDeviceGetHandleByPciBusId(board) for board in boards]
        return [NvmlGpu(nvml, handle) for handle in handles]
    except nvml.NVMLError as error:
        raise PowerError(f"nvml: no GPU can be read: {error}") from error


def _bus_ids() -> Iterator[str]:
    """Where on the PCI bus the GPUs are that CUDA shows to this process.

    The driver itself is asked, since CUDA_VISIBLE_DEVICES may hold numbers in either of two
    orders, beginnings of UUIDs, or MIG instances.
    """
    try:
        cuda = _driver()
        count = ctypes.c_int()
        if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
            count.value = 0
    except OSError as error:
        raise PowerError(f"nvml: CUDA's driver cannot be asked which GPUs: {error}") from error
    if not count.value:
        shown = os.environ["CUDA_VISIBLE_DEVICES"]
        raise PowerError(f"nvml: CUDA_VISIBLE_DEVICES={shown!r} shows no GPU to this process")
    for i in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(32)
        failed = cuda.cuDeviceGet(ctypes.byref(device), i)
        if failed or cuda.cuDeviceGetPCIBusId(name, len(name), device):
            raise PowerError(f"nvml: CUDA does not tell where its GPU {i} is")
        yield name.value.decode()


def _driver() -> Any:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
