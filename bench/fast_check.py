"""The fast path on a GPU against a slower backend, at the real widths and on the demo model.

    python -m bench.fast_check make REFERENCE.npz      on any machine, with PyTorch's CPU path
    python -m bench.fast_check compare REFERENCE.npz   on a GPU

Few layers and experts, random weights that every machine makes alike: a prompt of 512 tokens, then
single tokens of two sequences, then a chunk of 20; and 300 tokens of the demo's held-out text. Of
each position the tokens of the largest logits, those logits, and the logits of some columns are
kept. A different best token is no error where the reference's two best logits lie closer than the
two logits' errors: so agreement is also said for positions whose margin is more than that.
"""

import argparse
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import ds4
from ds4.backend import CacheMode, open_backend
from ds4.plan.flash import flash
from ds4.runner import Runner
from ds4.weights import load_weights
from ds4.weights.synthetic import SyntheticCheckpoint

COLUMNS = 512
BEST = 8
SIGMAS = 3.0  # that two logits' errors may move apart at a position where they are noise
RATIOS = (0, 4, 128, 4)
MODES: tuple[CacheMode, ...] = ("native", "exact")


def real_widths(mode: CacheMode, device: str) -> dict[str, np.ndarray]:
    cfg = replace(
        flash(),
        num_hidden_layers=len(RATIOS),
        compress_ratios=RATIOS,
        n_routed_experts=8,
        num_hash_layers=1,
    )
    be = open_backend("cuda", device, mode)
    weights = load_weights(be, cfg, SyntheticCheckpoint(cfg))
    runner = Runner(be, cfg, weights, context=1024, slots=2, max_chunk=512)
    ids = np.random.default_rng(0).integers(3, cfg.vocab_size, 700).tolist()
    prompt = be.download(runner.run({0: ids[:512]}, every_row=True))
    steps = [be.download(runner.run({0: [ids[512 + i]], 1: [ids[i]]})).copy() for i in range(24)]
    chunk = be.download(runner.run({0: ids[600:620]}, every_row=True))
    return {"prompt": prompt, "decode": np.concatenate(steps), "chunk": chunk}


def demo(mode: CacheMode, backend: str) -> dict[str, np.ndarray]:
    llm = ds4.load("demo", backend, cache=mode, context=1024)
    with open("ds4/demo/heldout.txt") as file:
        ids = llm.encode(file.read(3000))[:300]
    logits = llm.logits(ids)
    greedy = llm.generate(ids[:20], max_tokens=64, temperature=0).tokens
    return {"demo": logits, "demo greedy": np.array(greedy)}


def run(mode: CacheMode, device: str, small: str) -> dict[str, np.ndarray]:
    found = demo(mode, small) | real_widths(mode, device)
    columns = np.random.default_rng(1).integers(0, flash().vocab_size, COLUMNS)
    out: dict[str, np.ndarray] = {}
    for name, x in found.items():
        if x.ndim == 1:
            out[f"{mode} {name}"] = x
            continue
        best = np.argsort(-x, axis=1, kind="stable")[:, :BEST]
        out[f"{mode} {name}"] = x[:, columns % x.shape[1]]
        out[f"{mode} {name} best"] = best
        out[f"{mode} {name} high"] = np.take_along_axis(x, best, 1)
    return out


def compare(got: dict[str, np.ndarray], want: Any) -> None:
    for name in got:
        a, b = got[name], want[name]
        if name.endswith("greedy"):
            print(f"{name}: {(a == b).mean():.2%} of {len(b)} alike")
        elif not name.endswith(("best", "high")):
            each = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
            whole = np.linalg.norm(a - b) / np.linalg.norm(b)
            print(f"{name}: relative error {whole:.1e}, median position {np.median(each):.1e}")
            noise = np.sqrt(((a - b) ** 2).mean(1))
            judge(name, got, want, noise)


def judge(name: str, got: dict[str, np.ndarray], want: Any, noise: np.ndarray) -> None:
    """Best tokens: how many are alike, and what is the matter with each that is not.

    `noise` (T,) is how far a position's logits are off: the root of the mean square.
    """
    mine, best, high = got[f"{name} best"][:, 0], want[f"{name} best"], want[f"{name} high"]
    same, margin = mine == best[:, 0], high[:, 0] - high[:, 1]
    clear = margin > SIGMAS * 2**0.5 * noise
    print(
        f"{name} best: {same.mean():.2%} of {len(same)} alike; {same[clear].mean():.2%} of the"
        f" {clear.sum()} whose margin is over {SIGMAS} standard deviations of two logits' errors"
    )
    for t in np.flatnonzero(~same):
        place = np.flatnonzero(best[t] == mine[t])
        lost = f"{high[t, 0] - high[t, place[0]]:.4f}" if len(place) else f"over {BEST} places"
        print(
            f"    position {t}: the reference's margin {margin[t]:.4f}, to the token chosen {lost};"
            f" a logit's error {noise[t]:.4f} of {np.abs(high[t, 0]):.2f}"
        )


def main(action: str, path: str) -> None:
    start = time.time()
    if action == "make":
        torch.set_grad_enabled(False)
        made: dict[str, Any] = {}
        for mode in MODES:
            made |= run(mode, "cpu", "reference")
            print(mode, f"{time.time() - start:.0f} s", flush=True)
        np.savez_compressed(path, **made)
        return
    want = np.load(path)
    for mode in MODES:
        compare(run(mode, "auto", "cuda"), want)
        print(f"{time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="the fast path against a slower backend")
    parser.add_argument("action", choices=("make", "compare"))
    parser.add_argument("path", help="of the reference's results, .npz")
    args = parser.parse_args()
    main(args.action, args.path)
