"""What a source of power is: a name, what it covers, and readings."""

from dataclasses import dataclass
from typing import Literal, Protocol

Scope = Literal["chip", "dc-system", "wall"]
"""chip: what a processor says of itself. dc-system: the whole machine behind its power supply.
wall: before it, what is paid for."""


@dataclass(frozen=True)
class Reading:
    """What a source says at one moment: watts, a counter of joules, or both."""

    watts: float | None = None
    joules: float | None = None


class PowerSource(Protocol):
    """One meter. The sampler reads it every `interval_s`, in one thread."""

    @property
    def name(self) -> str:
        """Unique among the sources of a machine, such as "nvml:0 NVIDIA H100"."""

    @property
    def scope(self) -> Scope: ...

    @property
    def part(self) -> str:
        """What of the machine it covers: gpu, cpu, dram, soc or system. Parts of a scope add up."""

    @property
    def interval_s(self) -> float:
        """How often to read it."""

    @property
    def refresh_s(self) -> float:
        """How often the device itself takes a new value."""

    @property
    def wrap_j(self) -> float | None:
        """Joules at which its counter starts again from zero; None: it does not."""

    def read(self) -> Reading:
        """Raises OSError or PowerError if the device does not answer now."""

    def close(self) -> None: ...
