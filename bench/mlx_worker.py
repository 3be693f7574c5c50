"""One contender of bench.mlx_speed, in its own process: it answers a JSON line with a JSON line.

    python bench/mlx_worker.py ours|naive demo|middle|flash native|exact cpu|gpu

Run with another version's tree as PYTHONPATH, it measures that version.
"""

import argparse
import collections
import dataclasses
import json
import re
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ds4.backend import open_backend
from ds4.check import small_config
from ds4.config import Config
from ds4.loader import find_model
from ds4.plan.flash import flash
from ds4.runner import Runner
from ds4.weights import Checkpoint, load_weights
from ds4.weights.synthetic import SyntheticCheckpoint

# Primitives that only describe an array differently: no work, no command to a GPU.
VIEWS = {"AsStrided", "Broadcast", "BroadcastAxes", "Copy", "ExpandDims", "Flatten", "Reshape"}
VIEWS |= {"Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View"}
CONTEXT = 4096


def middle() -> Config:
    """Hidden 1,024, 12 layers, 64 experts; the other widths in proportion."""
    return dataclasses.replace(
        small_config(),
        vocab_size=4096,
        hidden_size=1024,
        num_hidden_layers=12,
        compress_ratios=(0, 0, *[4, 128] * 5),
        num_attention_heads=16,
        q_lora_rank=256,
        o_lora_rank=256,
        o_groups=4,
        sliding_window=128,
        index_n_heads=16,
        index_topk=512,
        n_routed_experts=64,
        num_experts_per_tok=6,
        moe_intermediate_size=256,
        num_hash_layers=3,
    )


def flash_small() -> Config:
    """The layers of DeepSeek-V4-Flash at small widths: the same operations on less."""
    small = small_config()
    kinds = {"num_hidden_layers", "num_hash_layers", "compress_ratios", "num_experts_per_tok"}
    kept = {name: value for name, value in vars(flash()).items() if name in kinds}
    widths: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 256,
        "n_routed_experts": 32,
        "sliding_window": 128,
        "index_topk": 512,
    }
    return dataclasses.replace(small, **kept, **widths)


def model(name: str) -> tuple[Config, Any]:
    if name == "demo":
        folder = find_model(name)
        return Config.from_file(folder / "config.json"), Checkpoint(folder)
    cfg = middle() if name == "middle" else flash_small()
    return cfg, SyntheticCheckpoint(cfg)


class Ours:
    def __init__(self, name: str, cache: Any, device: str) -> None:
        cfg, source = model(name)
        self.be = open_backend("mlx", device, cache)
        if name == "flash, kernels":
            self._as_on_a_mac()
        weights = load_weights(self.be, cfg, source)
        self.runner = Runner(self.be, cfg, weights, min(CONTEXT, cfg.max_position_embeddings))

    def _as_on_a_mac(self) -> None:
        """Packed weights and every Metal kernel, stood in for by one primitive: only to count.

        A norm and a compiled seam, which are several primitives on a CPU, count as one too.
        """
        from ds4.backends.mlx import experts, kernels, ops, weights
        from ds4.backends.mlx.kernels import launch

        def one_primitive(source: Any, constants: Any, arrays: Any, how: Any) -> Any:
            outputs = [mx.zeros(s, t) for s, t in zip(how.shapes, how.dtypes, strict=True)]
            mx.eval(outputs)
            return mx.depends(outputs, arrays)

        def one_norm(x: mx.array, w: mx.array | None, eps: float) -> mx.array:
            return mx.depends([x], [x] if w is None else [w])[0]

        def one_seam(gate_up: mx.array, limit: float) -> mx.array:
            return mx.depends([gate_up], [gate_up])[0][..., : gate_up.shape[-1] // 2]

        ops.upload = lambda tensor, device: weights.pack(tensor)
        self.be.kernels = frozenset(kernels.NAMES)  # type: ignore[attr-defined]
        launch.launch, experts.swiglu = one_primitive, one_seam
        mx.fast.rms_norm = one_norm  # type: ignore[assignment]

    def reset(self) -> None:
        self.runner.rewind(0, 0)

    def state(self) -> list[mx.array]:
        """What a step changes: it belongs to the graph of a token."""
        rows = [one for layer in self.runner.cache for one in vars(layer).values()]
        return [one.data for one in rows if one is not None]

    def run(self, ids: list[int]) -> mx.array:
        most = self.runner.max_chunk
        for start in range(0, len(ids), most):
            logits: mx.array = self.runner.run({0: ids[start : start + most]})
        return logits


class NaiveOne:
    def __init__(self, name: str, device: str) -> None:
        from bench.mlx_naive import Naive

        mx.set_default_device(mx.cpu if device == "cpu" else mx.gpu)
        naive = Naive(*model(name))
        self.reset, self.run = naive.reset, naive.run
        self.naive = naive

    def state(self) -> list[mx.array]:
        caches = [c for layer in self.naive.layers for c in (layer.cache, layer.index_cache)]
        arrays = [x for c in caches for x in c.state[:-1]]
        return [x for x in arrays if x is not None]


def measure(contender: Any, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Seconds of prefill and of greedy decoding, wall and CPU; the tokens chosen."""
    contender.reset()
    start, cpu = time.perf_counter(), time.process_time()
    logits = np.array(contender.run(prompt))
    middle_time, middle_cpu = time.perf_counter(), time.process_time()
    chosen = []
    for _ in range(tokens):
        chosen.append(int(logits[-1].argmax()))
        logits = np.array(contender.run(chosen[-1:]))
    return {
        "prefill": middle_time - start,
        "decode": time.perf_counter() - middle_time,
        "prefill_cpu": middle_cpu - cpu,
        "decode_cpu": time.process_time() - middle_cpu,
        "chosen": chosen,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def count(contender: Any, prompt: list[int]) -> dict[str, int]:
    """Primitives of the graph of one decoded token, by name, nothing of it computed yet."""
    contender.reset()
    mx.eval(contender.run(prompt[:128]))
    mx.eval(contender.run(prompt[:1]), contender.state())  # what is made once is there now
    started, mx.async_eval = mx.async_eval, lambda *arrays: None
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "graph.dot"
        logits = contender.run(prompt[:1])
        mx.export_to_dot(str(graph), logits, *contender.state())
        names = re.findall(r'label ?= ?"([A-Za-z]\w+)"', graph.read_text())
    mx.async_eval = started
    return dict(collections.Counter(names))


def main() -> None:
    parser = argparse.ArgumentParser(description="one contender of bench.mlx_speed")
    for word in "kind", "model", "cache", "device":
        parser.add_argument(word)
    args = parser.parse_args()
    kind, name, cache, device = args.kind, args.model, args.cache, args.device
    contender: Any = Ours(name, cache, device) if kind == "ours" else NaiveOne(name, device)
    for line in sys.stdin:
        task = json.loads(line)
        if task["do"] == "count":
            answer: dict[str, Any] = count(contender, task["prompt"])
        else:
            answer = measure(contender, task["prompt"], task["tokens"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
