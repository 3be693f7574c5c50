"""Which sources there are: those of this machine, and those that were named."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import PowerError
from .source import PowerSource

LOCAL = "nvml", "ioreport", "smc", "rapl", "hwmon"
NAMES = f"auto, none, {', '.join(LOCAL)}, shelly:ADDRESS, csv:FILE"


@dataclass
class Sources:
    """What is read as it runs, files to be read at the end, and why others are absent."""

    live: list[PowerSource] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)


def open_sources(specs: Sequence[str]) -> Sources:
    """Open what is named by NAMES; "auto" takes those of LOCAL that there are.

    Raises PowerError if a source that was named cannot be read.
    """
    found = Sources()
    for spec in specs:
        kind, _, rest = spec.partition(":")
        if kind == "auto":
            _open_local(found)
        elif kind in LOCAL and not rest:
            found.live += _opener(kind)()
        elif kind == "shelly" and rest:
            from .plug import ShellyPlug

            found.live.append(ShellyPlug(rest))
        elif kind == "csv" and rest:
            found.files.append(Path(rest))
        elif spec != "none":
            raise PowerError(f"no source of power is called {spec!r}: {NAMES}")
    names = [source.name for source in found.live]
    if len(set(names)) < len(names):
        raise PowerError("a source of power is named twice")
    return found


def _open_local(found: Sources) -> None:
    for kind in LOCAL:
        try:
            found.live += _opener(kind)()
        except (PowerError, OSError) as error:
            found.absent.append(str(error))


def _opener(kind: str) -> Callable[[], Sequence[PowerSource]]:
    from . import apple, linux, nvidia

    openers: dict[str, Callable[[], Sequence[PowerSource]]] = {
        "nvml": nvidia.nvidia,
        "ioreport": lambda: [apple.soc()],
        "smc": lambda: [apple.smc()],
        "rapl": linux.rapl,
        "hwmon": linux.supplies,
    }
    return openers[kind]
