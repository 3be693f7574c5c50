"""A long prompt at small widths: time and peak memory of the MLX backend, beside what it should be.

    python -m bench.mlx_long [--tokens 131072] [--chunk 256] [--device cpu|gpu]

The peak should stay at weights, caches and one block's working memory, whatever the length: nothing
may grow with tokens times entries. A dense mask of the last chunk alone would be as large as shown.
Then one token is decoded with `async_eval` pending, to see that caches are still written in place.
"""

import argparse
import dataclasses
import time

import mlx.core as mx
import numpy as np
from ds4.backends.mlx import attention, index

from ds4.backend import open_backend
from ds4.check import small_config
from ds4.runner import Runner
from ds4.weights import load_weights
from ds4.weights.synthetic import SyntheticCheckpoint


def main() -> None:
    parser = argparse.ArgumentParser(description="a long prompt on the MLX backend")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    cfg = dataclasses.replace(
        small_config(),
        num_attention_heads=2,
        index_n_heads=2,
        index_topk=64,
        compress_ratios=(0, 4, 128),
        num_hidden_layers=3,
        num_hash_layers=1,
        sliding_window=64,
    )
    be = open_backend("mlx", args.device)
    weights = load_weights(be, cfg, SyntheticCheckpoint(cfg))
    runner = Runner(be, cfg, weights, args.tokens + 64, max_chunk=args.chunk)
    rows = [one for layer in runner.cache for one in vars(layer).values() if one is not None]
    mx.eval([one.data for one in rows])  # zeros are lazy too
    held = mx.get_active_memory()
    caches = sum(one.data.nbytes for one in rows)
    dense = args.chunk * (args.tokens // 4) * 4 * cfg.index_n_heads
    print(f"weights and caches {held / 1e6:.1f} MB, of which caches {caches / 1e6:.1f}")
    tile = 4 * min(index.PRODUCTS, args.chunk * cfg.index_n_heads * index.TILE)
    block = 4 * min(
        attention.LOGITS, attention.BLOCK * cfg.num_attention_heads * args.tokens // 128
    )
    gathered = 4 * min(attention.GATHERED, args.chunk * cfg.index_topk * cfg.head_dim)
    most = 4 * max(tile, block, gathered)
    print(f"predicted: {most / 1e6:.1f} MB above that at any length: four times the largest block")
    print(f"one dense score matrix of the last chunk would be {dense / 1e6:.1f} MB")
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, args.tokens).tolist()
    start = last = time.perf_counter()
    mx.reset_peak_memory()
    for at in range(0, args.tokens, args.chunk):
        be.download(runner.run({0: tokens[at : at + args.chunk]}))
        done = at + args.chunk
        if (done >= 8192 and done & (done - 1) == 0) or done == args.tokens:
            now = time.perf_counter()
            peak = mx.get_peak_memory() - held
            print(f"{done:9,} tokens  {now - start:7.1f} s  peak above that {peak / 1e6:7.1f} MB")
            mx.reset_peak_memory()
    _decode(runner, held)
    print(f"all in {time.perf_counter() - last:.1f} s")


def _decode(runner: Runner, held: int) -> None:
    """Tokens one after another, each step begun before the one before it was waited for."""
    be, times = runner.be, []
    logits = runner.run({0: [1]})
    mx.reset_peak_memory()
    for _ in range(16):
        start = time.perf_counter()
        token = logits.argmax(-1).astype(mx.int32)
        mx.async_eval(token)
        logits = runner.run_ahead([0], token)
        be.download(token)
        times.append(time.perf_counter() - start)
    mx.eval(logits)
    peak = mx.get_peak_memory() - held
    print(f"decode there {np.median(times) * 1e3:.2f} ms a token, peak above {peak / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
