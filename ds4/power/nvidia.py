"""NVIDIA GPUs, by NVML: a counter of millijoules, and the power of this instant, of each board."""

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

    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByIndex(index)
        name = nvml.nvmlDeviceGetName(self._handle)
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
    """Every GPU that the driver shows. Raises PowerError if there is none."""
    try:
        import pynvml as nvml
    except ImportError as error:
        raise PowerError("nvml: nvidia-ml-py is missing: pip install 'ds4[power]'") from error
    try:
        nvml.nvmlInit()
        return [NvmlGpu(nvml, i) for i in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        raise PowerError(f"nvml: no GPU can be read: {error}") from error
