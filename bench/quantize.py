"""Rate and memory of `ds4 quantize` on layers of the real width, made of random bytes.

    python -m bench.quantize [--layers 2] [--experts 256] [--recipe q2] [--methods ls,gptq,rtn]
                             [--device cpu] [--stop 0] [--tokens 8192] [--folder TMP] [--out FILE]

Each layer has the shapes of DeepSeek-V4-Flash, so that 256 experts are 3.4 GB to read; the
vocabulary is small. A process of its own quantizes, and its peak memory is reported; CPU time, of
all threads, says more than the clock's on a machine that others use. `--stop N`
ends the run after N expert matrices, for a slow CPU. `--tokens` is for gptq, whose Hessians come
from recorded inputs of so many tokens.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bench.decode import _commit, _machine
from ds4.config import Config
from ds4.plan.flash import flash_fields
from ds4.quant.convert import Method
from ds4.quant.inputs import Inputs, Recorder
from ds4.quant.quantize import quantize_checkpoint
from ds4.quant.recipes import RECIPES
from ds4.quant.targets import Target, plan
from ds4.weights import Checkpoint
from ds4.weights.names import expected
from ds4.weights.synthetic import SyntheticCheckpoint

_DTYPES = {"f32": "F32", "bf16": "BF16", "int": "I64", "fp8": "F8_E4M3", "mxfp4": "I8"}


class Enough(Exception):
    """The run has gone on for as long as asked."""


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        cfg = _make(folder / "source", args.layers, args.experts)
        for method in args.methods.split(","):
            _run(folder, cfg, method, args)


def _run(folder: Path, cfg: Config, method: Method, args: argparse.Namespace) -> None:
    tokens = args.tokens if method == "gptq" else None
    inputs = None if tokens is None else _record(folder / "inputs", cfg, tokens)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        found = pool.submit(_measure, folder, method, args, inputs).result()
    row = {
        **{name: getattr(args, name) for name in ("layers", "experts", "recipe")},
        "method": method,
        "stopped_after": args.stop or None,
        "tokens": tokens,
        **found,
        "machine": _machine(args.device),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(row, indent=1), flush=True)
    if args.out:
        with Path(args.out).open("a") as file:
            file.write(json.dumps(row) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="rate and memory of ds4 quantize")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--recipe", default="q2")
    parser.add_argument("--methods", default="ls")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stop", type=int, default=0, help="after so many expert matrices")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--folder", help="a disk with room for the layers, twice")
    parser.add_argument("--out", help="append a JSON line")
    return parser.parse_args()


def _make(folder: Path, layers: int, experts: int) -> Config:
    """A checkpoint in the official formats, a file a layer, each tensor made when it is written."""
    fields = flash_fields() | {
        "num_hidden_layers": layers,
        "num_hash_layers": 0,
        "n_routed_experts": experts,
        "vocab_size": 1024,
        "num_nextn_predict_layers": 0,
    }
    fields["compress_ratios"] = [*fields["compress_ratios"][:layers], 0]
    cfg = Config.from_dict(fields)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    source = SyntheticCheckpoint(cfg)
    files: dict[str, dict[str, Any]] = {}
    for name, shape in expected(cfg).items():
        layer = name.split(".")[1] if name.startswith("layers.") else "x"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    for file, shapes in files.items():
        _write(folder / file, source, shapes, cfg)
    return cfg


def _write(path: Path, source: SyntheticCheckpoint, shapes: dict[str, Any], cfg: Config) -> None:
    """The data, then the header in the room that was left for it."""
    header, end, room = {}, 0, 400 * (len(shapes) + 1)
    with path.open("wb") as file:
        file.seek(8 + room)
        for name, shape in shapes.items():
            below = cfg.n_routed_experts if name.endswith("tid2eid") else None
            tensor = source.read(name, shape, below)
            scale = name.replace(".weight", ".scale")
            dtype = _DTYPES[tensor.format]
            for key, kind, array in ((name, dtype, tensor.data), (scale, "F8_E8M0", tensor.scales)):
                if array is not None:
                    start, end = end, end + array.nbytes
                    said = {"shape": list(array.shape), "data_offsets": [start, end]}
                    header[key] = {"dtype": kind, **said}
                    file.write(np.ascontiguousarray(array).data)
        file.seek(0)
        file.write(room.to_bytes(8, "little") + json.dumps(header).encode().ljust(room))


def _record(path: Path, cfg: Config, tokens: int) -> Path:
    """Inputs as a Recorder would have them, with every expert as likely."""
    rng = np.random.default_rng(0)
    with Recorder(path, cfg, tokens) as recorder:
        for layer in range(cfg.num_hidden_layers):
            for start in range(0, tokens, 256):
                count = min(256, tokens - start)
                x = rng.standard_normal((count, cfg.hidden_size), np.float32)
                ids = rng.random((count, cfg.n_routed_experts)).argsort(-1)
                ids = ids[:, : cfg.num_experts_per_tok]
                recorder.add(layer, x, ids, np.full(ids.shape, 0.25, np.float32))
    return path


def _measure(
    folder: Path, method: Method, args: argparse.Namespace, inputs: Path | None
) -> dict[str, Any]:
    """In a process of its own."""
    import resource

    source = folder / "source"
    checkpoint, cfg = Checkpoint(source), Config.from_file(source / "config.json")
    targets = [t for file in plan(checkpoint, cfg, RECIPES[args.recipe]).values() for t in file]
    ends = np.cumsum([target.source_bytes for target in targets])
    clock = _Clock(targets, ends, args.stop)
    device = args.device
    try:
        made = quantize_checkpoint(
            source,
            folder / f"made-{method}",
            args.recipe,
            method,
            inputs=None if inputs is None else Inputs(inputs),
            device=args.device,
            progress=clock,
        )
        device = made.device
    except Enough:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "device": device,
        "source_bytes": clock.done,
        "seconds": round(clock.seconds, 2),
        "source_mb_s": round(clock.done / clock.seconds / 1e6, 1),
        "expert_weights": clock.weights,
        "ns_per_expert_weight": round(clock.expert_seconds / max(clock.weights, 1) * 1e9, 2),
        "cpu_ns_per_expert_weight": round(clock.expert_cpu / max(clock.weights, 1) * 1e9, 2),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20,
    }


class _Clock:
    """The quantizer's progress, and the share of it that experts took."""

    def __init__(self, targets: list[Target], ends: Any, stop: int) -> None:
        self.targets, self.ends, self.stop = targets, ends, stop
        self.done = self.weights = self.matrices = 0
        self.expert_seconds = self.expert_cpu = 0.0  # the clock's, and of all threads
        self.start = self.last = self.cpu = 0.0

    @property
    def seconds(self) -> float:
        return self.last - self.start

    def __call__(self, done: int, total: int) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        self.start = self.start or now
        target = self.targets[int(np.searchsorted(self.ends, min(done, self.ends[-1])))]
        if ".experts." in target.name and done > self.done:
            each = target.source_bytes // len(target.sources)
            share = (done - self.done) / each
            self.matrices += round(share)
            self.weights += round(share * np.prod(target.shape))
            self.expert_seconds += now - self.last
            self.expert_cpu += cpu - self.cpu
        self.done, self.last, self.cpu = done, now, cpu
        if self.stop and self.matrices >= self.stop:
            raise Enough


if __name__ == "__main__":
    main()
