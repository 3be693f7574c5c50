"""What a result was measured on and with: enough to measure it again."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = "ds4", "torch", "triton", "mlx", "numpy", "nvidia-ml-py", "zeus-apple-silicon", "httpx"


def environment() -> dict[str, Any]:
    """Machine, versions, commit, command and time."""
    from ..cli.machine import describe

    return {
        "machine": describe(),
        "gpu_settings": _gpu_settings(),
        "packages": {name: _version(name) for name in _PACKAGES if _version(name)},
        "python": sys.version.split()[0],
        "commit": os.environ.get("DS4_COMMIT") or _commit(),
        "command": command(sys.argv[1:]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }


def command(words: Sequence[str]) -> str:
    """The command line, without the secret of --api-key."""
    shown, hide = ["ds4"], False
    for word in words:
        shown.append(
            "***" if hide else word.partition("=")[0] + "=***" if _holds_key(word) else word
        )
        hide = word == "--api-key"
    return shlex.join(shown)


def _holds_key(word: str) -> bool:
    return word.startswith("--api-key=")


def machine_name(machine: dict[str, Any]) -> str:
    """What to call it in a table: its GPUs, else its processor."""
    gpus = [gpu.split(",")[0] for gpu in machine["gpus"] if gpu != "none found"]
    if not gpus:
        return str(machine["cpu"])
    count = f"{len(gpus)} x " if len(gpus) > 1 else ""
    return count + gpus[0]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the source folder; None for an installed package."""
    folder = Path(__file__).parent.parent.parent
    return _said("git", "-C", str(folder), "describe", "--always", "--dirty")


def _gpu_settings() -> list[str]:
    """Power limit, clocks and temperature of each NVIDIA GPU."""
    fields = "power.limit,clocks.sm,clocks.mem,temperature.gpu,persistence_mode"
    text = _said("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader") or ""
    return [line.strip() for line in text.splitlines()]


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
