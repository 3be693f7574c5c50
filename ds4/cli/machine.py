"""What this machine is made of, found without any array library."""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

NVIDIA_FIELDS = "name,memory.total,driver_version"


def describe() -> dict[str, Any]:
    """The parts of the machine by name, as text; `gpus` is a list."""
    return {
        "platform": platform.platform(),
        "cpu": f"{_cpu()}, {os.cpu_count()} threads",
        "memory": _memory(),
        "gpus": _nvidia_gpus() + _apple_gpu() or ["none found"],
    }


def _cpu() -> str:
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> str:
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return "unknown"
    return f"{size / 2**30:.1f} GiB"


def _nvidia_gpus() -> list[str]:
    """Name, memory and driver of each GPU."""
    text = _output("nvidia-smi", f"--query-gpu={NVIDIA_FIELDS}", "--format=csv,noheader")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _apple_gpu() -> list[str]:
    """Apple Silicon's GPU, which shares the memory of the CPU."""
    if platform.system() != "Darwin" or platform.machine() != "arm64":
        return []
    return [f"{_cpu()} GPU, shares the memory"]


def _output(*command: str) -> str:
    """What a program prints; nothing if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace").strip()
