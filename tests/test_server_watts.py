"""Watts, joules and a request's share, from meters that say what they are told to."""

import time
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from ds4.engine.api import Finished
from ds4.power.source import Reading
from ds4.server.watts import Watts


@dataclass
class Meter:
    name: str
    scope: str
    part: str
    readings: list[Reading] = field(default_factory=list)
    wrap_j: float | None = None
    interval_s: float = 1.0
    refresh_s: float = 0.1

    def read(self) -> Reading:
        if not self.readings:
            raise OSError("unplugged")
        return self.readings.pop(0)

    def close(self) -> None:
        pass


def test_counters_and_watts_become_joules() -> None:
    counted = Meter("gpu0", "chip", "gpu", [Reading(joules=j) for j in (90, 95, 3)], wrap_j=100)
    drawn = Meter("plug", "wall", "system", [Reading(watts=w) for w in (100, 200, 200)])
    watts = Watts([counted, drawn], running=lambda: 2)
    registry = CollectorRegistry()
    registry.register(watts)
    now = time.monotonic()
    for second in (3, 2, 1):
        watts.poll(now - second)

    def value(name: str, domain: str, source: str) -> float | None:
        return registry.get_sample_value(name, {"domain": domain, "source": source})

    assert value("ds4_energy_joules_total", "gpu", "gpu0") == 13
    assert value("ds4_power_watts", "gpu", "gpu0") == 8
    assert value("ds4_energy_joules_total", "wall", "plug") == 350
    assert value("ds4_power_watts", "wall", "plug") == 200
    watts.poll(now)  # unplugged: nothing is made up
    assert value("ds4_energy_joules_total", "wall", "plug") == 350
    assert value("ds4_power_watts", "wall", "plug") is None


def test_a_request_has_its_share_of_the_widest_meter() -> None:
    meters = [
        Meter("gpu0", "chip", "gpu", [Reading(watts=50)] * 4),
        Meter("plug", "wall", "system", [Reading(watts=100)] * 4),
    ]
    watts = Watts(meters, running=lambda: 4)
    end = Finished("a", "stop", 1, 0, 1, prefill_s=0.5, decode_s=1.5)
    assert watts.share(end) == {}
    now = time.monotonic()
    for second in (3, 2, 1, 0):
        watts.poll(now - second)
    joules = watts.share(end)["joules"]
    assert 45 < joules < 60  # 2 s of 100 W by four, and what the test itself took
    assert watts.share(Finished("a", "stop", 1, 0, 1, decode_s=60.0)) == {}
