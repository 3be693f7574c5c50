"""How well a layer's experts can be guessed before it is their turn, on the trained demo model.

    python -m bench.guess_experts [--tokens 800]

A guess made while the layer before computes is its router applied to that layer's input; another is
what the token before chose. Each is shown beside chance: the share of a token's experts that are
among the first 1, 1.5 and 2 times as many guessed. Layers whose experts a table gives are left out.
"""

import argparse
from typing import Any

import numpy as np
import torch

import ds4
from ds4.runner import Runner

WIDTHS = (1.0, 1.5, 2.0)
TEXT = "Once upon a time there was a king who had three daughters, and the youngest of them"


class Watched:
    """A backend that keeps, of every routed layer, its router, its input and what it chose."""

    def __init__(self, be: Any) -> None:
        self.be = be
        self.seen: list[tuple[Any, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.be, name)

    def route(self, w: Any, x: Any, step: Any, cfg: Any) -> Any:
        ids, weights = self.be.route(w, x, step, cfg)
        self.seen.append((w, x, ids))
        return ids, weights


def ranked(be: Any, w: Any, x: Any) -> torch.Tensor:
    """Experts (T, E), the likeliest first, if `x` were this router's input."""
    z = be.linear(w.weight, x)
    order: torch.Tensor = (torch.nn.functional.softplus(z).sqrt() + w.bias).argsort(-1).flip(-1)
    return order


def found(guesses: torch.Tensor, ids: torch.Tensor) -> float:
    """The share of `ids` (T, K) that are among `guesses` (T, n)."""
    return float((ids[:, :, None] == guesses[:, None]).any(-1).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="guessing the next layer's experts")
    parser.add_argument("--tokens", type=int, default=800)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    llm = ds4.load("demo", backend="torch", device="cpu", context=2048)
    text = llm.encode(TEXT)
    ids = text + llm.generate(text, max_tokens=args.tokens, temperature=1.0, seed=1).tokens
    first = llm.runner
    be = Watched(first.be)
    runner = Runner(be, first.cfg, first.weights, context=2048, max_chunk=1024)
    runner.run({0: ids[:1000]})
    picks, experts = first.cfg.num_experts_per_tok, first.cfg.n_routed_experts
    print(f"{min(len(ids), 1000)} tokens, {picks} of {experts} experts a token")
    for number in range(1, len(be.seen)):
        w, _, chosen = be.seen[number]
        if w.tid2eid is not None:
            continue
        order = ranked(be, w, be.seen[number - 1][1])
        last = torch.cat([chosen[:1], chosen[:-1]])
        for width in WIDTHS:
            count = round(width * picks)
            row = {"layer": number, "guessed": count, "by chance": count / experts}
            row["router on the layer before"] = found(order[:, :count], chosen)
            if width == 1:
                row["as the token before"] = found(last, chosen)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    same = [found(torch.cat([c[:1], c[:-1]]), c) for w, _, c in be.seen if w.tid2eid is None]
    print("experts of the token before, mean", np.round(np.mean(same), 3))


if __name__ == "__main__":
    main()
