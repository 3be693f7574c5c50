"""NVML as a source of power, against a library and a driver that only pretend."""

# ruff: noqa: N802 - methods of the stand-in for NVML have its names

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from ds4.errors import PowerError
from ds4.power import nvidia
from ds4.power.opening import open_sources


class FakeNvml:
    """Two cards: one with all that is asked, one that only tells its mean power."""

    NVML_FI_DEV_POWER_INSTANT = 186
    NVML_SUCCESS = 0

    class NVMLError(Exception):
        pass

    def __init__(self, cards: int = 2) -> None:
        self.cards = cards

    def nvmlInit(self) -> None:
        if not self.cards:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return self.cards

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> int:
        return ["0000:18:00.0", "0000:3A:00.0"].index(bus_id)

    def nvmlDeviceGetIndex(self, handle: int) -> int:
        return handle

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"Card {handle}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if handle:
            raise self.NVMLError("Not Supported")
        return 5_000_500

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[int]) -> list[Any]:
        assert fields == [186]
        value = SimpleNamespace(uiVal=301_250)
        return [SimpleNamespace(nvmlReturn=3 if handle else 0, value=value)]

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 88_000


class FakeCuda:
    """The driver, which shows the GPUs at these places."""

    def __init__(self, *bus_ids: str) -> None:
        self.bus_ids = bus_ids

    def cuInit(self, flags: int) -> int:
        return 0 if self.bus_ids else 100  # no device

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.bus_ids)
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetPCIBusId(self, name: Any, size: int, device: Any) -> int:
        assert size > 12
        name.value = self.bus_ids[device.value].encode()
        return 0


def test_nvml_takes_the_counter_and_the_instant_power(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    new, old = nvidia.nvidia()
    assert (new.name, new.scope, new.part) == ("nvml:0 Card 0", "chip", "gpu")
    assert (new.read().watts, new.read().joules) == (301.25, 5000.5)
    assert (old.read().watts, old.read().joules) == (88.0, None)


@pytest.mark.parametrize(
    ("shown", "places", "names"),
    [
        ("1", ["0000:3A:00.0"], ["nvml:1 Card 1"]),
        ("0,1", ["0000:3A:00.0", "0000:18:00.0"], ["nvml:1 Card 1", "nvml:0 Card 0"]),  # by speed
        ("GPU-5e1f", ["0000:18:00.0"], ["nvml:0 Card 0"]),
        ("MIG-a,MIG-b", ["0000:18:00.0", "0000:18:00.0"], ["nvml:0 Card 0"]),
    ],
)
def test_nvml_reads_the_gpus_that_cuda_shows_to_this_process(
    monkeypatch: pytest.MonkeyPatch, shown: str, places: list[str], names: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    monkeypatch.setattr(nvidia, "_driver", lambda: FakeCuda(*places))
    assert [gpu.name for gpu in nvidia.nvidia()] == names


def test_nvml_without_a_visible_gpu_or_a_driver_to_ask_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(nvidia, "_driver", FakeCuda)
    with pytest.raises(PowerError, match="CUDA_VISIBLE_DEVICES='' shows no GPU"):
        open_sources(["nvml"])

    def missing() -> Any:
        raise OSError("libcuda.so.1: no such file")

    monkeypatch.setattr(nvidia, "_driver", missing)
    with pytest.raises(PowerError, match="cannot be asked which GPUs"):
        open_sources(["nvml"])


def test_nvml_without_a_driver_or_library_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(0))
    with pytest.raises(PowerError, match="no GPU can be read: Driver Not Loaded"):
        open_sources(["nvml"])
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = open_sources(["auto"])
    assert any("pip install 'ds4" in why for why in found.absent)
