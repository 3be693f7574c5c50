"""Every source against a stand-in for its device: files, a plug on the loopback, fake libraries."""

import json
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds4.errors import PowerError
from ds4.power import apple, energy
from ds4.power.linux import rapl, supplies
from ds4.power.meter_file import read_meter
from ds4.power.opening import open_sources
from ds4.power.plug import ShellyPlug

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
