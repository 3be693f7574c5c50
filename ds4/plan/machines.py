"""Machines by name: memory, bandwidth and arithmetic, from their makers' data sheets.

Kinds: "mac" and "unified" have one memory; "gpu" has cards with their own, and host memory behind
a link. Memory is in GiB, bandwidth in GB/s, arithmetic in dense bf16 or fp16 TFLOP/s.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import Ds4Error

if TYPE_CHECKING:
    from .published import Efficiency

GIB = 2**30
DEFAULT_RAM = 128.0  # GiB beside cards, where --ram does not say
_SYSTEM = 8.0  # GiB left to the system and its programs
_PCIE_4 = 25.0  # GB/s from host memory through 16 lanes, read by a card's kernels
_PCIE_5 = 48.7  # measured: docs/offload.md
_NVIDIA = ("dgxspark",)  # of machines with unified memory
_WIRED_DEFAULT, _WIRED_RAISED = 0.75, 0.90  # what macOS gives the GPU, and what it can be told to


class PlanError(Ds4Error):
    """The machine or model to plan for is unknown, or contradicts itself."""


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know; None where nobody knows, and no speed is estimated then."""

    name: str
    kind: str  # "mac", "unified", "gpu" or "cpu"
    cards: int
    memory: float  # GiB: of one card, or all of the unified memory
    ram: float  # GiB of host memory beside cards
    bandwidth: float | None  # GB/s, one card
    tflops: float | None  # one card
    link: float = 0.0  # GB/s from host memory, all cards together: two share the lanes of one
    measured: "Efficiency | None" = None  # of bandwidth and arithmetic, in place of published

    @property
    def backend(self) -> str:
        """The backend that loader.choose_backend takes there."""
        if self.kind == "mac":
            return "mlx"
        return "cuda" if self.kind == "gpu" or self.name in _NVIDIA else "reference"

    @property
    def gpu_limit(self) -> float:
        """Bytes that the GPUs can use as the machine is."""
        if self.kind == "gpu":
            return self.cards * self.memory * GIB
        if self.kind == "mac":
            return _WIRED_DEFAULT * self.memory * GIB
        return max(0.0, self.memory - _SYSTEM) * GIB

    @property
    def raised_limit(self) -> float:
        """Bytes that the GPU can use once a Mac's wired limit is raised."""
        return _WIRED_RAISED * self.memory * GIB if self.kind == "mac" else self.gpu_limit

    @property
    def host_limit(self) -> float:
        """Bytes of weights that host memory can hold for the cards."""
        return max(0.0, self.ram - _SYSTEM) * GIB if self.kind == "gpu" else 0.0

    @property
    def wired_limit_command(self) -> str:
        """How a Mac's limit is raised until its next start."""
        return f"sudo sysctl iogpu.wired_limit_mb={int(self.raised_limit / 2**20)}"


class _Mac(NamedTuple):
    bandwidth: float
    tflops: float
    memory: tuple[int, ...]


_MACS = {
    "m1": _Mac(68, 2.6, (8, 16)),
    "m1pro": _Mac(200, 5.3, (16, 32)),
    "m1max": _Mac(400, 10.6, (32, 64)),
    "m1ultra": _Mac(800, 21.2, (64, 128)),
    "m2": _Mac(100, 3.6, (8, 16, 24)),
    "m2pro": _Mac(200, 6.8, (16, 32)),
    "m2max": _Mac(400, 13.6, (32, 64, 96)),
    "m2ultra": _Mac(800, 27.2, (64, 128, 192)),
    "m3": _Mac(100, 4.1, (8, 16, 24)),
    "m3pro": _Mac(150, 7.4, (18, 36)),
    "m3max": _Mac(400, 16.4, (36, 48, 64, 96, 128)),
    "m3ultra": _Mac(819, 28.2, (96, 256, 512)),
    "m4": _Mac(120, 4.3, (16, 24, 32)),
    "m4pro": _Mac(273, 9.2, (24, 48, 64)),
    "m4max": _Mac(546, 18.4, (36, 48, 64, 128)),
    "m5": _Mac(153, 11, (16, 24, 32)),
    "m5pro": _Mac(307, 22, (24, 48, 64)),
    "m5max": _Mac(614, 44, (36, 48, 64, 128)),
}
# these memory sizes come only with the smaller GPU of the chip: GB/s, TFLOP/s
_SMALLER = {
    ("m3max", 36): (300.0, 12.3),
    ("m3max", 96): (300.0, 12.3),
    ("m4max", 36): (410.0, 14.7),
    ("m5max", 36): (460.0, 35.0),
}


class _Card(NamedTuple):
    memory: float
    bandwidth: float
    tflops: float
    link: float
    pattern: str  # in the name that the driver reports


_CARDS = {
    "5090": _Card(31.8, 1792, 210, _PCIE_5, "RTX 5090"),
    "4090": _Card(24.0, 1008, 165, _PCIE_4, "RTX 4090"),
    "3090": _Card(24.0, 936, 71, _PCIE_4, "RTX 3090"),
    "pro6000": _Card(95.6, 1792, 504, _PCIE_5, "RTX PRO 6000"),
    "h100": _Card(79.6, 3350, 989, _PCIE_5, "H100"),
    "h200": _Card(139.8, 4800, 989, _PCIE_5, "H200"),
}
_UNIFIED = {
    "dgxspark": Machine("dgxspark", "unified", 1, 119.0, 0, 273, 125),
    "strixhalo": Machine("strixhalo", "unified", 1, 124.0, 0, 256, 59),
}


def names() -> list[str]:
    """Names that `named` knows; cards also take a count before them, as in 2x5090."""
    macs = [f"{chip}-{memory}" for chip, found in _MACS.items() for memory in found.memory]
    return [*macs, *_CARDS, *_UNIFIED]


def named(name: str) -> Machine:
    """A machine by name, such as m4max-128, 2x5090 (or 5090x2) or dgx-spark."""
    key = re.sub(r"[^a-z0-9]", "", name.lower())
    apple = re.fullmatch(r"(m\d(?:pro|max|ultra)?)(\d*)(?:gb)?", key)
    if apple and apple[1] in _MACS:
        if apple[2] and int(apple[2]) in _MACS[apple[1]].memory:
            return mac(apple[1], int(apple[2]))
        sizes = ", ".join(f"{apple[1]}-{memory}" for memory in _MACS[apple[1]].memory)
        raise PlanError(f"no machine is called {name!r}: {apple[1]} comes as {sizes}")
    pc = re.fullmatch(r"(?:([1-9]\d?)x)?(?:rtx)?(\w+?)(?:x([1-9]\d?))?", key)
    if pc and pc[2] in _CARDS:
        return cards(pc[2], int(pc[1] or pc[3] or 1))
    if key in _UNIFIED:
        return _UNIFIED[key]
    known = ", ".join([*_MACS, *_CARDS, *_UNIFIED])
    raise PlanError(
        f"no machine is called {name!r}; known are {known}; Macs take their memory, as in "
        "m4max-128, cards a count, as in 2x5090; for others give --vram, --ram and --bandwidth"
    )


def mac(chip: str, memory: float) -> Machine:
    """A Mac with this chip and so many GiB."""
    found = _MACS[chip]
    bandwidth, tflops = _SMALLER.get((chip, int(memory)), found[:2])
    return Machine(f"{chip}-{memory:g}", "mac", 1, memory, 0, bandwidth, tflops)


def cards(card: str, count: int = 1, ram: float = DEFAULT_RAM) -> Machine:
    """A PC with so many cards of one kind and so many GiB of host memory."""
    found = _CARDS[card]
    name = card if count == 1 else f"{count}x{card}"
    machine = Machine(name, "gpu", count, found.memory, ram, found.bandwidth, found.tflops)
    return replace(machine, link=found.link)


def detected(facts: Mapping[str, Any]) -> Machine:
    """The machine that `ds4 doctor` describes: texts of its "cpu", "memory" and "gpus"."""
    found = re.match(r"[\d.]+", facts["memory"])
    ram = float(found[0]) if found else 0.0
    chip = re.sub(r"[^a-z0-9]", "", facts["cpu"].partition(",")[0].lower().removeprefix("apple"))
    if chip in _MACS:
        return replace(mac(chip, round(ram)), name=f"this machine ({chip}-{round(ram)})")
    if facts["cpu"].startswith("Apple"):  # newer than this table
        return Machine("this machine", "mac", 1, ram, 0, None, None)
    gpus = [re.fullmatch(r"(.+), (\d+) MiB, .*", gpu) for gpu in facts["gpus"]]
    memory = [int(gpu[2]) / 1024 for gpu in gpus if gpu]
    if not memory:
        return Machine("this machine (no GPU)", "cpu", 1, ram, 0, None, None)
    names = [gpu[1] for gpu in gpus if gpu]
    card = _CARDS.get(_card_of(names[0]) or "") if len(set(names)) == 1 else None
    return Machine(
        f"this machine ({len(names)}x {names[0]})",
        "gpu",
        len(names),
        min(memory),
        ram,
        card.bandwidth if card else None,
        card.tflops if card else None,
        card.link if card else _PCIE_4,
    )


def _card_of(reported: str) -> str | None:
    """5090, from "NVIDIA GeForce RTX 5090"; variants of that name are other cards."""
    if re.search(r"laptop|max-q|pcie| d\b", reported, re.IGNORECASE):
        return None
    return next((name for name, card in _CARDS.items() if card.pattern in reported), None)


def adjusted(
    machine: Machine,
    vram: float | None = None,
    ram: float | None = None,
    bandwidth: float | None = None,
    link: float | None = None,
) -> Machine:
    """The machine with what the user knows better: GiB, GiB, GB/s, GB/s from host memory a card."""
    if vram is not None and machine.kind == "cpu":
        host = machine.memory
        machine = Machine("a GPU as described", "gpu", 1, vram, host, None, None, _PCIE_4)
    elif vram is not None:
        machine = replace(machine, memory=vram)
    if ram is not None:
        field = "ram" if machine.kind == "gpu" else "memory"
        machine = replace(machine, **{field: ram})  # type: ignore[arg-type]
    if bandwidth is not None:
        machine = replace(machine, bandwidth=bandwidth)
    if link is not None and machine.kind == "gpu":
        machine = replace(machine, link=link * machine.cards)
    return machine
