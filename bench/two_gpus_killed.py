"""A rank is killed in the middle of a text that several GPUs write: how soon does all end, and how?

    python -m bench.two_gpus_killed [--gpus 2] [--model flash] [--device auto] [--seconds 60]
        [--out out/two_gpus.jsonl]

One GPU writes the beginning of the same text at the same time: how far are the two alike? Nothing
heavy is imported before it is over.
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
SHORT, LONG = 256, 4000  # tokens; the second is not waited for
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
    options = _options(model, device)
    alone = _started([*options, "-n", str(SHORT)], {"CUDA_VISIBLE_DEVICES": _last_gpu()})
    several = _started([*options, "--gpus", str(gpus), "-n", str(LONG)], {})
    for run in alone, several:
        _ends_in(seconds, run)
    assert several.stdout is not None
    text = several.stdout.read(1)
    said = {"seconds_to_text": round(time.perf_counter() - began, 1)}
    print(f"   text after {said['seconds_to_text']} s", flush=True)
    want, errors = _within(seconds / 4, alone)
    time.sleep(SETTLED_S)
    victims = _followers(several.pid)
    if not victims or not text:
        several.kill()
        raise RuntimeError((errors + several.communicate()[1]).decode())
    during = used_gb()
    os.kill(victims[0], signal.SIGKILL)
    start = time.perf_counter()
    rest, errors = several.communicate()
    took = time.perf_counter() - start
    while max(used_gb(), default=0) > max(before, default=0) + 0.2:
        if time.perf_counter() - start > 10:
            break
        time.sleep(0.05)
    freed = time.perf_counter() - start
    return said | {
        "seconds_to_end": round(took, 2),
        "seconds_to_free_memory": round(freed, 2),
        "status": several.returncode,
        "said": errors.decode().strip(),
        "used_gb_before_during_after": [before, during, used_gb()],
        "bytes_as_on_one_gpu": f"{_alike(text + rest, want)} of {len(want)}",
    }


def _options(model: str, device: str) -> list[str]:
    backend = "torch" if device == "cpu" else "cuda"
    layers = "7" if model == "flash" else "all"
    options = ["Once upon a time", "--temperature", "0", "--context", str(CONTEXT)]
    options += ["--synthetic", model, "--unique-layers", layers]
    return [*options, "--backend", backend, "--device", device]


def _started(options: Sequence[str], env: dict[str, str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-X", "faulthandler", "-m", "ds4.cli", "generate", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=os.environ | env, stdout=pipe, stderr=pipe, bufsize=0)


def _ends_in(seconds: float, run: "subprocess.Popen[bytes]") -> None:
    """After so long it shows where it is, and ends."""
    timer = threading.Timer(seconds, run.send_signal, [signal.SIGABRT])
    timer.daemon = True
    timer.start()


def _within(seconds: float, run: "subprocess.Popen[bytes]") -> tuple[bytes, bytes]:
    """What it printed, if it ends by itself."""
    try:
        return run.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        run.kill()
        return run.communicate()


def _last_gpu() -> str:
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return shown.split(",")[-1] if shown else str(max(len(used_gb()) - 1, 0))


def _alike(text: bytes, want: bytes) -> int:
    """Bytes that both begin with."""
    pairs = zip(text, want, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(want)))


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
