"""The experts of a layer for many tokens: gemm_clusters.cu beside gemm.cu, equal to the bit?

    python -m bench.prefill_experts [--out bench/results/gemm.jsonl] [--experts 256]

256 experts of the real model, native and q2, 6 a token, uniform routing. Times are medians in CUDA
graphs; sums over a token's experts are left out. Weights are 3.3 GB: no cache holds them.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ds4.backends.cuda.kernels import gemm, gemm_clusters, moe_gemm

from .gpu_gemm import plan, rand, uniform
from .kernels import timed
from .machine import describe

WIDTH, HIDDEN, PICKS, LIMIT = 4096, 2048, 6, 10.0
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
FORMATS = {"native": ("mxfp4", 4, 32), "q2": ("affine", 2, 128)}


def rows(recipe: str, experts: int) -> Iterator[dict[str, Any]]:
    kind, up, down = FORMATS[recipe], (HIDDEN, WIDTH), (WIDTH, HIDDEN)
    w1, w3, w2 = (rand(*kind, experts, *shape) for shape in (up, up, down))
    for tokens in TOKENS:
        chosen = plan(uniform(tokens, PICKS, experts), experts)
        x = gemm.permute(torch.randn(tokens, WIDTH, device="cuda").half() / 8, w1)
        tile = moe_gemm.tile_tokens(w1, len(chosen.order))
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "gemm.cu": partial(moe_gemm.each_expert, (w1, w3, w2), x, chosen, LIMIT, tile),
            "gemm_clusters.cu": partial(gemm_clusters.each_expert, (w1, w3, w2), x, chosen, LIMIT),
        }
        first, second = (way() for way in ways.values())
        equal = torch.equal(first, second)
        del first, second
        us = {name: round(timed("cuda", [way] * 2) * 1e6, 1) for name, way in ways.items()}
        used = gemm_clusters.serves((w1, w3, w2), len(chosen.order))
        yield {"bench": "experts", "recipe": recipe, "experts": experts, "tokens": tokens,
               "us": us, "equal": equal, "used": list(ways)[used]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="experts of many tokens")
    parser.add_argument("--out", help="append a JSON line for each case")
    parser.add_argument("--experts", type=int, default=256, help="of a layer")
    args = parser.parse_args()
    facts = describe("cuda")
    for recipe in FORMATS:
        for row in rows(recipe, args.experts):
            print(row, flush=True)
            if args.out:
                with Path(args.out).open("a") as out:
                    out.write(json.dumps(row | facts) + "\n")


if __name__ == "__main__":
    main()
