"""Every source against a stand-in for its device: files, a plug on the loopback, fake libraries."""

# ruff: noqa: N802 - methods of the stand-in for NVML have its names

import json
import struct
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds4.errors import PowerError
from ds4.power import Total, Trace, apple, energy, nvidia
from ds4.power import calibration as calibrating
from ds4.power.linux import rapl, supplies
from ds4.power.meter_file import read_meter
from ds4.power.opening import open_sources
from ds4.power.plug import ShellyPlug
from tests.power_sim import Clock, Line, Meter, constant, watch

# files of Linux


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")
    return folder


def test_rapl_reads_packages_and_their_memory(tmp_path: Path) -> None:
    ranged = {"max_energy_range_uj": "262143328850"}
    write(tmp_path / "intel-rapl:0", name="package-0", energy_uj="1500000", **ranged)
    write(tmp_path / "intel-rapl:0:0", name="core", energy_uj="1", **ranged)
    write(tmp_path / "intel-rapl:0:1", name="dram", energy_uj="2500000", **ranged)
    write(tmp_path / "intel-rapl:1", name="psys", energy_uj="1", **ranged)
    package, dram = rapl(tmp_path)
    assert (package.part, dram.part) == ("cpu", "dram")
    assert package.read().joules == 1.5
    assert dram.read().joules == 2.5
    assert package.wrap_j == pytest.approx(262143.32885)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("many")
    with pytest.raises(PowerError, match="holds 'many', not a number"):
        package.read()


def test_rapl_that_only_root_may_read_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "intel-rapl:0"
    write(folder, name="package-0", energy_uj="1", max_energy_range_uj="9")
    read_text = Path.read_text

    def refuse(self: Path, *args: Any, **kwargs: Any) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(PowerError, match=r"root alone: docs/power.md"):
        rapl(tmp_path)


def test_power_supplies_are_those_that_measure_all_of_their_output(tmp_path: Path) -> None:
    write(tmp_path / "hwmon0", name="nvme", power1_input="9000000")
    write(tmp_path / "hwmon1", name="corsairpsu", power1_input="412000000")
    (supply,) = supplies(tmp_path)
    assert (supply.scope, supply.part, supply.read().watts) == ("dc-system", "system", 412.0)
    with pytest.raises(PowerError, match="no power supply"):
        supplies(tmp_path / "hwmon0")


# a plug


class _Plug(BaseHTTPRequestHandler):
    answer: bytes = b""
    status = 200

    def do_GET(self) -> None:
        assert self.path == "/rpc/Switch.GetStatus?id=0"
        self.send_response(type(self).status)
        self.send_header("content-length", str(len(type(self).answer)))
        self.end_headers()
        self.wfile.write(type(self).answer)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def plug() -> Iterator[tuple[type[_Plug], str]]:
    class Handler(_Plug):
        answer = json.dumps({"id": 0, "output": True, "apower": 731.4, "voltage": 230.1}).encode()

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Handler, f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_plug_tells_watts_at_the_wall(plug: tuple[type[_Plug], str]) -> None:
    handler, address = plug
    source = ShellyPlug(address)
    assert (source.name, source.scope, source.part) == (f"shelly:{address}", "wall", "system")
    assert source.read().watts == 731.4
    handler.answer = b'{"code": 404}'
    with pytest.raises(PowerError, match="no number called apower"):
        source.read()
    handler.status = 401
    with pytest.raises(PowerError, match="401"):
        source.read()
    source.close()


def test_no_plug_is_an_error_that_names_it() -> None:
    with pytest.raises(PowerError, match=r"shelly:127\.0\.0\.1:9: .*refused"):
        open_sources(["shelly:127.0.0.1:9"])


# a file


def test_a_meters_file_becomes_a_trace(tmp_path: Path) -> None:
    file = tmp_path / "meter.csv"
    rows = [f"{1_700_000_000 + i},{100 + i},x" for i in range(61)]
    file.write_text("Timestamp,Watts,Note\n" + "\n".join(rows) + "\n\n")
    trace = read_meter(file, 1_700_000_000 - 50.0)
    found = energy(trace, 60.0, 100.0)
    assert (trace.scope, trace.refresh_s) == ("wall", 1.0)
    assert found.joules == pytest.approx((110 + 150) / 2 * 40)
    assert found.valid


def test_a_meters_file_may_count_watt_hours_and_have_dates(tmp_path: Path) -> None:
    file = tmp_path / "meter.csv"
    rows = [f"2026-01-01T00:{i // 60:02}:{i % 60:02}+00:00,{5 + i / 3600}" for i in range(100)]
    file.write_text("time,wh\n" + "\n".join(rows))
    trace = read_meter(file, 0.0)
    start = trace.samples[0][0]
    assert start == 1767225600.0
    assert energy(trace, start + 10, start + 70).joules == pytest.approx(60.0, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "line 1 must name a time column"),
        ("time,watts\n1,2\n3,many\n", "line 3: could not convert"),
        ("time,watts\nsoon,2\n", "line 2: Invalid isoformat"),
        ("time,watts\n1\n", "line 2"),
    ],
)
def test_a_file_that_cannot_be_read_names_the_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "meter.csv"
    file.write_text(text)
    with pytest.raises(PowerError, match=said):
        read_meter(file, 0.0)
    with pytest.raises(PowerError, match="cannot be read"):
        read_meter(tmp_path / "none.csv", 0.0)


# NVML


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


# Macs


def smc(values: dict[str, float]) -> Any:
    """The SMC's side of the messages, written from its C structure's offsets."""

    def call(sent: bytes) -> bytes:
        assert len(sent) == 80
        key = struct.unpack_from("=I", sent, 0)[0].to_bytes(4, "big").decode()
        answer = bytearray(80)
        if key not in values:
            answer[40] = 0x84
        elif sent[42] == 9:
            struct.pack_into("=II", answer, 28, 4, int.from_bytes(b"flt ", "big"))
        else:
            assert sent[42] == 5
            assert struct.unpack_from("=I", sent, 28)[0] == 4
            struct.pack_into("<f", answer, 48, values[key])
        return bytes(answer)

    return call


def test_the_smcs_total_is_read_from_its_structure() -> None:
    source = apple.SmcTotal(smc({"PSTR": 67.25}))
    assert (source.scope, source.part, source.read().watts) == ("dc-system", "system", 67.25)
    with pytest.raises(PowerError, match="PSTR cannot be read, code 132"):
        apple.SmcTotal(smc({}))


def test_the_parts_of_an_apple_chip_add_up() -> None:
    told = SimpleNamespace(cpu_total_mj=1000, gpu_mj=2500, gpu_sram_mj=None, dram_mj=500, ane_mj=0)
    monitor = SimpleNamespace(get_cumulative_energy=lambda: told)
    assert apple.SocCounters(monitor).read().joules == 4.0
    told.gpu_mj = None
    with pytest.raises(PowerError, match="does not count"):
        apple.SocCounters(monitor)


def test_an_ultra_is_not_read_by_a_library_that_sees_half_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(apple, "_need_mac", lambda name: None)
    monkeypatch.setattr(apple, "_chip", lambda: "Apple M3 Ultra\n")
    with pytest.raises(PowerError, match="one of the two dies"):
        apple.soc()


# which there are


def test_sources_by_name() -> None:
    assert open_sources(["none"]).live == []
    assert open_sources(["csv:a.csv"]).files == [Path("a.csv")]
    with pytest.raises(PowerError, match="no source of power is called 'plug'"):
        open_sources(["plug"])


# calibration


def calibrated(noise: float = 0.0) -> tuple[calibrating.Calibration, list[Trace]]:
    """From a machine that takes 45 W + 1.12 times what its GPU says."""
    clock = Clock()
    points = [(0.0, 70.0), (1100.0, 70.0), (1100.0, 400.0), (1200.0, 400.0), (1e6, 400.0)]
    chip = Meter(Line(points), clock)
    outside = Line([(t, 45 + 1.12 * w) for t, w in points])
    plug = Meter(outside, clock, "plug", "wall", "system", 0.5, 0.9, counts=False)
    traces = watch(clock, chip, plug, seconds=200).traces
    return calibrating.fit(traces, "box"), traces


def test_a_calibration_finds_the_line_and_says_that_it_estimates(tmp_path: Path) -> None:
    made, traces = calibrated()
    assert made.base_w == pytest.approx(45, abs=3)
    assert made.slope == pytest.approx(1.12, rel=0.01)
    assert made.error < 0.02
    made.save(tmp_path / "box.json")
    line = calibrating.load(tmp_path / "box.json")
    assert line == made
    measured = Total("chip", "gpu", 10.0, 4000.0)
    wall = line.wall(measured)
    assert (wall.scope, wall.covers) == ("estimated wall", "system")
    assert wall.joules == pytest.approx(4930, rel=0.01)
    assert wall.valid
    assert line.fits(measured, "box")
    assert not line.fits(measured, "another box")
    assert not line.fits(Total("chip", "cpu+gpu", 10.0, 4000.0), "box")
    assert "900 W, it was made from" in line.wall(Total("chip", "gpu", 10.0, 9000.0)).problems[0]
    with pytest.raises(PowerError, match="needs a meter at the wall"):
        calibrating.fit(traces[:1], "box")


def test_a_calibration_at_one_load_is_refused() -> None:
    clock = Clock()
    plug = Meter(constant(900.0), clock, "plug", "wall", "system", 0.5, 0.9, counts=False)
    traces = watch(clock, Meter(constant(500.0), clock), plug, seconds=200).traces
    with pytest.raises(PowerError, match="from 500 to 500 W"):
        calibrating.fit(traces, "box")


def test_a_calibration_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "box.json"
    for text in "{}", "[1]", "not json":
        file.write_text(text)
        with pytest.raises(PowerError, match="not a calibration"):
            calibrating.load(file)


def test_clocks_of_the_meters_file_and_the_sampler_agree(tmp_path: Path) -> None:
    from ds4.power.sampler import now

    offset = time.time() - now()
    file = tmp_path / "meter.csv"
    file.write_text("time,watts\n" + "\n".join(f"{time.time() + i},5" for i in range(3)))
    assert read_meter(file, offset).samples[0][0] == pytest.approx(now(), abs=30)
