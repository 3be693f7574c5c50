"""A rank is killed in the middle of a text that several GPUs write: how soon does all end, and how?

    python -m bench.two_gpus_killed [--gpus 2] [--model flash] [--device auto] [--seconds 60]
        [--out out/two_gpus.jsonl]

Nothing heavy is imported before it is over.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SETTLED_S = 1.0  # that the text goes on before one of its writers dies
TOKENS = 4000  # not waited for
CONTEXT = 4096


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="a rank that dies")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--model", default="flash", help="flash, or demo to try the script")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=60, help="at the most")
    parser.add_argument("--out", type=Path, default=Path("out/two_gpus.jsonl"))
    args = parser.parse_args(arguments)
    row = {"bench": "two_gpus", "part": "killed", "kind": "killed", "gpus": args.gpus}
    row |= killed(args.model, args.gpus, args.device, args.seconds)
    print("  ", row, flush=True)
    from .machine import describe

    row |= describe("cpu" if args.device == "cpu" else "cuda:0")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        file.write(json.dumps(row) + "\n")


def killed(model: str, gpus: int, device: str, seconds: float) -> dict[str, Any]:
    """What was seen. Raises RuntimeError with what was said if no text was begun."""
    began, before = time.perf_counter(), used_gb()
    run = _started([*_options(model, device), "--gpus", str(gpus), "-n", str(TOKENS)])
    _ends_in(seconds, run)
    assert run.stdout is not None
    text = run.stdout.read(1)
    said = {"seconds_to_text": round(time.perf_counter() - began, 1)}
    print(f"   text after {said['seconds_to_text']} s", flush=True)
    time.sleep(SETTLED_S)
    victims = _followers(run.pid)
    if not victims or not text:
        run.kill()
        raise RuntimeError(run.communicate()[1].decode())
    during = used_gb()
    os.kill(victims[0], signal.SIGKILL)
    start = time.perf_counter()
    _, errors = run.communicate()
    took = time.perf_counter() - start
    while max(used_gb(), default=0) > max(before, default=0) + 0.2:
        if time.perf_counter() - start > 10:
            break
        time.sleep(0.05)
    freed = time.perf_counter() - start
    return said | {
        "seconds_to_end": round(took, 2),
        "seconds_to_free_memory": round(freed, 2),
        "status": run.returncode,
        "said": errors.decode().strip(),
        "used_gb_before_during_after": [before, during, used_gb()],
    }


def _options(model: str, device: str) -> list[str]:
    backend = "torch" if device == "cpu" else "cuda"
    layers = "7" if model == "flash" else "all"
    options = ["Once upon a time", "--temperature", "0", "--context", str(CONTEXT)]
    options += ["--synthetic", model, "--unique-layers", layers]
    return [*options, "--backend", backend, "--device", device]


def _started(options: Sequence[str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-X", "faulthandler", "-m", "ds4.cli", "generate", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, bufsize=0)


def _ends_in(seconds: float, run: "subprocess.Popen[bytes]") -> None:
    """After so long it shows where it is, and ends."""
    timer = threading.Timer(seconds, run.send_signal, [signal.SIGABRT])
    timer.daemon = True
    timer.start()


def used_gb() -> list[float]:
    """Memory in use on every GPU of this host."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver
        return []
    each = [
        pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
    ]
    return [round(pynvml.nvmlDeviceGetMemoryInfo(gpu).used / 1e9, 2) for gpu in each]


def _followers(pid: int) -> list[int]:
    """The processes that the one of this id started as ranks."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if int(state[1]) == pid and b"ds4.parallel" in command:
                found.append(int(entry.name))
    return sorted(found)


if __name__ == "__main__":
    main()
