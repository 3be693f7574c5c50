"""What Linux tells in files: RAPL counters of processors, and power supplies that report."""

from collections.abc import Iterator
from pathlib import Path

from ..errors import PowerError
from .source import Reading, Scope

RAPL = Path("/sys/class/powercap")
HWMON = Path("/sys/class/hwmon")
_SUPPLIES = {"corsairpsu"}  # drivers of whole power supplies, whose power1 is all of their output


class RaplDomain:
    """A package or its memory, counted in microjoules; the counter wraps within minutes."""

    scope: Scope = "chip"
    interval_s = 0.1
    refresh_s = 0.001

    def __init__(self, folder: Path, part: str) -> None:
        self.name = f"rapl:{_text(folder / 'name')} {folder.name}"
        self.part = part
        self._file = folder / "energy_uj"
        self.wrap_j: float | None = _number(folder / "max_energy_range_uj") / 1e6
        self.read()

    def read(self) -> Reading:
        return Reading(joules=_number(self._file) / 1e6)

    def close(self) -> None:
        """Nothing is open."""


class PowerSupply:
    """The output of a power supply: the whole machine, without what the supply itself loses."""

    scope: Scope = "dc-system"
    part = "system"
    interval_s = refresh_s = 1.0
    wrap_j: float | None = None

    def __init__(self, folder: Path) -> None:
        self.name = f"hwmon:{_text(folder / 'name')} {folder.name}"
        self._file = folder / "power1_input"
        self.read()

    def read(self) -> Reading:
        return Reading(watts=_number(self._file) / 1e6)

    def close(self) -> None:
        """Nothing is open."""


def rapl(root: Path = RAPL) -> list[RaplDomain]:
    """Packages and their memory. Raises PowerError if there is none, or root alone may read it."""
    found = list(_domains(root))
    if not found:
        raise PowerError(f"rapl: {root} shows no processor that counts its energy")
    try:
        return [RaplDomain(folder, part) for folder, part in found]
    except PermissionError as error:
        raise PowerError(
            f"rapl: {error.filename} may be read by root alone: docs/power.md has the rule "
            "that opens it"
        ) from error


def _domains(root: Path) -> Iterator[tuple[Path, str]]:
    for folder in sorted(root.glob("intel-rapl:*")):
        if not (folder / "energy_uj").exists():
            continue
        name = _text(folder / "name")
        if name.startswith("package"):
            yield folder, "cpu"
        elif name == "dram":
            yield folder, "dram"


def supplies(root: Path = HWMON) -> list[PowerSupply]:
    """Power supplies that tell their output. Raises PowerError if there is none."""
    folders = [
        folder
        for folder in sorted(root.glob("hwmon*"))
        if (folder / "power1_input").exists() and _text(folder / "name") in _SUPPLIES
    ]
    if not folders:
        raise PowerError(f"hwmon: {root} shows no power supply that reports")
    return [PowerSupply(folder) for folder in folders]


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace").strip()


def _number(file: Path) -> int:
    text = _text(file)
    try:
        return int(text)
    except ValueError as error:
        raise PowerError(f"{file} holds {text[:40]!r}, not a number") from error
