"""What bench.two_gpus checks: the same results on several GPUs as on one, and a rank that dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import ds4
from ds4.backend import open_backend
from ds4.loader import Synthetic
from ds4.plan.flash import flash
from ds4.runner import Runner
from ds4.weights import load_weights
from ds4.weights.synthetic import SyntheticCheckpoint

from .machine import describe

RATIOS = (0, 4, 128, 4)
FEW_EXPERTS = 16
SETTLED_S = 2.0  # that a text is written before one of its writers dies


def computed(model: str, device: str) -> dict[str, np.ndarray]:
    """The demo model's logits and greedy text, and steps of four layers of the real widths."""
    backend = "torch" if device == "cpu" else "cuda"
    llm = ds4.load("demo", backend, device, "exact", context=512)
    ids = llm.encode("The king went down to the sea and said to his men, ")[:40]
    found = {"demo logits": llm.logits(ids * 2)}
    found["demo tokens"] = np.array(llm.generate(ids, max_tokens=64, temperature=0).tokens)
    cfg = replace(
        flash() if model == "flash" else Synthetic(model).config(),
        n_routed_experts=FEW_EXPERTS,
    )
    if model == "flash":
        layers = {"num_hidden_layers": len(RATIOS), "num_hash_layers": 1}
        cfg = replace(cfg, compress_ratios=RATIOS, **layers)  # type: ignore[arg-type]
    be = open_backend(backend, device, "exact")
    weights = load_weights(be, cfg, SyntheticCheckpoint(cfg))
    runner = Runner(be, cfg, weights, context=512, slots=2, max_chunk=256)
    ids = np.random.default_rng(0).integers(3, cfg.vocab_size, 400).tolist()
    found["wide prompt"] = be.download(runner.run({0: ids[:256]}, every_row=True))
    steps = [be.download(runner.run({0: [ids[256 + i]], 1: [ids[i]]})).copy() for i in range(12)]
    return found | {"wide decode": np.concatenate(steps)}


def compared(got: dict[str, np.ndarray], want: Any) -> dict[str, Any]:
    """Of each array the relative error and the share of equal best tokens."""
    row: dict[str, Any] = {"kind": "equality"}
    for name, x in got.items():
        y = want[name]
        if x.ndim == 1:
            row[name] = f"{(x == y).sum()} of {len(y)} alike"
            continue
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        row[f"{name}, relative error"] = float(f"{error:.2g}")
        row[f"{name}, largest difference"] = float(f"{np.abs(x - y).max():.2g}")
        each = np.linalg.norm(x - y, axis=-1) / np.linalg.norm(y, axis=-1)
        row[f"{name}, rows that differ by 1 %"] = f"{(each > 0.01).sum()} of {len(each)}"
        row[f"{name}, median row's error"] = float(f"{np.median(each):.2g}")
        row[f"{name}, best alike"] = round(float((x.argmax(-1) == y.argmax(-1)).mean()), 4)
    return row


def killed(model: str, gpus: int, device: str, out: Path, seconds: float) -> None:
    """A text through the command, whose second process is killed in the middle of it."""
    backend = "torch" if device == "cpu" else "cuda"
    command = [sys.executable, "-X", "faulthandler", "-m", "ds4.cli", "generate"]
    command += ["Once upon a time", "--temperature", "0"]
    command += ["--gpus", str(gpus), "--synthetic", model, "--unique-layers"]
    command += ["7" if model == "flash" else "all", "--backend", backend, "--device", device]
    command += ["--context", "4096"]
    pipe = subprocess.PIPE
    before = used_gb()
    with subprocess.Popen([*command, "-n", "4000"], stdout=pipe, stderr=pipe, text=True) as run:
        too_late = threading.Timer(seconds - 3, run.send_signal, [signal.SIGABRT])  # shows where
        too_late.start()
        assert run.stdout is not None
        run.stdout.read(1)
        time.sleep(SETTLED_S)
        during = used_gb()
        victims = _followers(run.pid)
        for victim in victims[:1]:
            os.kill(victim, signal.SIGKILL)
        start = time.perf_counter()
        errors = run.communicate()[1]
        took = time.perf_counter() - start
        too_late.cancel()
    while (
        max(used_gb(), default=0) > max(before, default=0) + 0.2
        and time.perf_counter() - start < 20
    ):
        time.sleep(0.1)
    row = {
        "bench": "two_gpus",
        "part": "killed",
        "kind": "killed",
        "gpus": gpus,
        "killed": len(victims[:1]),
        "seconds_to_end": round(took, 2),
        "seconds_to_free_memory": round(time.perf_counter() - start, 2),
        "status": run.returncode,
        "said": errors.strip(),
        "used_gb_before_during_after": [before, during, used_gb()],
        **describe("cpu" if device == "cpu" else "cuda:0"),
    }
    print("  ", row, flush=True)
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")


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
