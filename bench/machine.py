"""The machine a figure belongs to: what it is, and how fast it reads and multiplies right now."""

import argparse
import itertools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch


def named_parts(about: str | None, *names: str) -> list[str]:
    """Those of a script's parts that the command line names; --help says what the script is."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=raw)
    parser.add_argument("part", nargs="*", help=" or ".join(names))
    given: list[str] = parser.parse_args().part
    if unknown := set(given) - set(names):
        parser.error(f"no part {', '.join(sorted(unknown))}: there is {', '.join(names)}")
    return given


def describe(device: str) -> dict[str, Any]:
    """What every row of results says about where it was measured."""
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu(),
        "driver": _driver() if cuda else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": os.environ.get("DS4_COMMIT") or _said("git", "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.processor() or platform.machine()}, {cores} cores"


def _driver() -> str | None:
    return _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    """What a program prints; None where there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


class Clock:
    """Marks moments in the work of a device without waiting for it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """The moment at which the device reaches this point; a CPU has reached it."""
        if self.device.startswith("cuda"):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Seconds between the marks so far. Waits."""
        wait(self.device)
        pairs = itertools.pairwise(self._marks)
        if self.device.startswith("cuda"):
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def median_seconds(device: str, work: Callable[[], object], runs: int = 10) -> float:
    """Of `runs` calls, after two that warm up."""
    clock = Clock(device)
    work()
    work()
    clock.mark()
    for _ in range(runs):
        work()
        clock.mark()
    return statistics.median(clock.intervals())


def ceilings(device: str) -> dict[str, float]:
    """Bytes a second of a read and of a copy (read and written), operations a second in bf16."""
    large = device.startswith("cuda")
    a = torch.ones(1 << (30 if large else 24), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    words = a.view(torch.int32)
    read = a.nbytes / median_seconds(device, words.max)
    copy = 2 * a.nbytes / median_seconds(device, lambda: b.copy_(a))
    n = 8192 if large else 512
    x, y = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if large else torch.float32)
    multiply = 2 * n**3 / median_seconds(device, lambda: x @ y)
    return {"read": read, "copy": copy, "bandwidth": max(read, copy), "operations": multiply}
