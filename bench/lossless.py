"""Text with guesses beside text without, and how many guesses were right, by position.

    python -m bench.lossless [--backends reference,mlx,torch] [--model demo] [--ways lookup,mtp]
        [--device cpu] [--gpus 1] [--prompts 20] [--tokens 500] [--cache exact]
        [--out bench/results/speculate.jsonl]

"mtp" is the model's own drafter: the demo's MTP block, or the DSpark of a folder that
scripts/train_demo_dspark.py wrote. Prompts are pieces of the demo model's held-out text, and
repetitive ones (a list that goes on); half of all texts are greedy, half are drawn with a seed.
Every text must be the same to the token. One that differs is explained only if, where it first
does, both tokens come out when the logits are shaken as little as the shape of a step changes them,
which is measured: rounding decided; else the exit status is 1. The policy is free in one run, so
that lengths vary; to count right guesses by position, the run before it always guesses as many as
the drafter can.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import ds4
from ds4 import SamplingParams
from ds4.draft.policy import Policy
from ds4.draft.speculate import Speculator
from ds4.draft.times import Times
from ds4.engine.api import Request
from ds4.loader import find_model

from .engine_equivalence import noise, shaken
from .machine import describe
from .policies import Always, Counted

LEAST = 1e-5  # noise of logits at least: so much do a step's rows move float32 ones on MLX
screen = Console(width=150)


def main(arguments: list[str] | None = None) -> None:
    args, different = _arguments(arguments), 0
    for backend in args.backends:
        options: dict[str, Any] = {"cache": args.cache, "context": 200 + args.tokens}
        options["gpus"] = args.gpus
        plain = ds4.load(args.model, backend, args.device, **options)
        asked = prompts(plain, args.prompts)
        start = time.perf_counter()
        want = [plain.generate(p, max_tokens=args.tokens, **how) for p, how in asked]
        seconds = time.perf_counter() - start
        sigma = noise(plain, plain, np.random.default_rng(0), LEAST)
        for way in args.ways:
            llm = ds4.load(args.model, backend, args.device, **options, speculate=way)
            for policy in (Always, Policy):
                row = compare(plain, llm, policy, asked, want, (args.tokens, sigma))
                row |= {
                    "bench": "lossless",
                    "backend": backend,
                    "cache": args.cache,
                    "gpus": args.gpus,
                }
                row |= {"plain_s": round(seconds, 1), "noise": sigma}
                row |= describe(plain.runner.be.device)
                different += row["different"] - row["explained"]
                screen.print(row)
                if args.out:
                    with Path(args.out).open("a") as file:
                        file.write(json.dumps(row) + "\n")
    sys.exit(different > 0)


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="speculation changes no text")
    parser.add_argument(
        "--backends", type=lambda text: text.split(","), default=["reference", "mlx", "torch"]
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--ways", type=lambda text: text.split(","), default=["lookup", "mtp"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gpus", type=int, default=1, help="that share the model")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--cache", default="exact")
    parser.add_argument("--out", help="append JSON lines")
    return parser.parse_args(given)


def prompts(llm: ds4.LLM, count: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Token ids and how tokens are chosen; every fourth prompt repeats itself."""
    assert llm.tokenizer is not None
    text = next(iter(sorted(find_model("demo").glob("heldout.txt")))).read_text("utf-8")
    asked = []
    for number in range(count):
        at = number * len(text) // count
        piece = text[at : at + 300]
        if number % 4 == 3:
            piece = "".join(f"{n}. the king, the queen and the {n} sons.\n" for n in range(1, 9))
        ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode(piece)][:150]
        greedy = {"temperature": 0.0}
        asked.append((ids, greedy if number % 8 < 4 else {"temperature": 1.0, "seed": number}))
    return asked


def medians(times: Times) -> dict[str, float]:
    """Milliseconds that the policy believes in, by kind, and rows or guesses."""
    each = ((kind, *one) for kind, sizes in times.means.items() for one in sizes.items())
    return {f"{kind}, {size}": round(seconds * 1e3, 2) for kind, size, seconds in each}


def near_tie(
    plain: ds4.LLM,
    prompt: list[int],
    how: dict[str, Any],
    got: list[int],
    want: list[int],
    sigma: float,
) -> bool:
    """Whether rounding decides between the first tokens that differ."""
    request = Request("one", prompt, SamplingParams(**(plain.defaults | how)))
    return shaken(plain, request, got, want, sigma, plain.runner.be)


def compare(
    plain: ds4.LLM,
    llm: ds4.LLM,
    kind: type[Policy],
    asked: Any,
    want: list[Any],
    limits: tuple[int, float],
) -> dict[str, Any]:
    """`limits` are tokens of a text, and the noise that explains a difference."""
    assert llm.speculator is not None
    tokens, sigma = limits
    drafter = llm.speculator.drafter
    shares: dict[str, list[float]] = {}
    different = explained = 0
    start = time.perf_counter()
    counts: dict[str, Counted] = {}
    for number, ((prompt, how), expected) in enumerate(zip(asked, want, strict=True)):
        repeats = "repetitive" if number % 4 == 3 else "held-out"
        name = f"{repeats}, {'greedy' if not how['temperature'] else 'drawn'}"
        policy = counts.setdefault(name, Counted(kind(drafter.longest)))
        llm.speculator = Speculator(llm.runner, drafter, policy)
        made = llm.generate(prompt, max_tokens=tokens, **how)
        if made.tokens != expected.tokens:
            different += 1
            explained += near_tie(plain, prompt, how, made.tokens, expected.tokens, sigma)
    for name, policy in counts.items():
        right = [policy.right_at[n] for n in range(1, drafter.longest + 1)]
        shares[name] = [round(r / m, 3) for r, m in zip(right, policy.made_at(), strict=True) if m]
    return {
        "way": drafter.name,
        "policy": kind.__name__.lower(),
        "texts": len(asked),
        "tokens": sum(len(one.tokens) for one in want),
        "different": different,
        "explained": explained,
        "right_by_position": shares,
        "guesses_by_position": {name: policy.made_at() for name, policy in counts.items()},
        "step_ms": {name: medians(policy.inner.costs.steps) for name, policy in counts.items()},
        "draft_ms": {name: medians(policy.inner.costs.drafts) for name, policy in counts.items()},
        "rounds": sum(policy.rounds for policy in counts.values()),
        "seconds": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    main()
