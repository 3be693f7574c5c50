"""What bench.two_gpus compares: results on several GPUs with those on one."""

from dataclasses import replace
from typing import Any

import numpy as np

import ds4
from ds4.backend import open_backend
from ds4.loader import Synthetic
from ds4.plan.flash import flash
from ds4.runner import Runner
from ds4.weights import load_weights
from ds4.weights.synthetic import SyntheticCheckpoint

RATIOS = (0, 4, 128, 4)
FEW_EXPERTS = 16


def computed(model: str, backend: str, device: str) -> dict[str, np.ndarray]:
    """The demo model's logits and greedy text, and steps of four layers of the real widths."""
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
