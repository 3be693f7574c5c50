"""A rank of tests/test_parallel.py whose experts are in two memories: all ranks run this program.

python -m tests.parallel_placed GPUS
"""

import json
import sys
from dataclasses import replace
from typing import Any

from ds4.backends.cuda.placement import Placement, placement, swap

from ds4.backend import open_backend
from ds4.check import small_config
from ds4.parallel.launch import join
from ds4.plan.placement import Budget, Need
from ds4.runner import Runner
from ds4.weights import load_weights
from ds4.weights.synthetic import SyntheticCheckpoint

EXPERTS = 9
PROMPT = list(range(5, 45))


def eager(state: Any, most: int) -> list[tuple[int, int]]:
    """Always a pair to swap, where there is one: what moves must not matter."""
    here = state.owner[state.owner >= 0]
    pinned, others = (here[(state.home_of[here] < 0) == want] for want in (True, False))
    return [(int(a), int(b)) for a, b in zip(pinned[:1], others[:1], strict=False)]


def results(gpus: int = 1) -> dict[str, Any]:
    """Of a prompt and a greedy text after it; ranks keep 3 of their experts in slots."""
    cfg = replace(small_config(), n_routed_experts=EXPERTS)
    be: Any = open_backend("torch", "cpu", "exact")
    if gpus > 1:
        layers = range(cfg.num_hidden_layers)
        held = [be.holds(layer, EXPERTS) for layer in layers]
        need = Need(cfg, 0, (16, 16, 16), 128, 1, len(held[0]))
        homes = need.held - 1  # one is in a slot and nowhere else
        budget = Budget(need, (3,) * len(layers), homes, 64, 2, 0)
        be.placement = Placement(budget, "cpu", held=held)
    runner = Runner(be, cfg, load_weights(be, cfg, SyntheticCheckpoint(cfg)), 128, 1, 64)
    logits = [be.download(runner.run({0: PROMPT}))[-1]]
    tokens = [int(logits[-1].argmax())]
    for _ in range(40):
        logits.append(be.download(runner.run({0: [tokens[-1]]}))[-1])
        tokens.append(int(logits[-1].argmax()))
    found = {"logits": [x.tolist() for x in logits], "tokens": tokens}
    if gpus > 1:
        found |= be.placement.report().fields() | {"held": list(held[0])}
        found["swaps"] = be.placement.swaps.count
    return found


if __name__ == "__main__":
    count = int(sys.argv[1])
    crew = join(count, [sys.executable, "-m", "tests.parallel_placed", sys.argv[1]])
    assert crew is not None
    placement.LOOK_EVERY, swap.swaps = 2, eager
    found = results(count)
    if crew.rank == 0:
        print(json.dumps(found))
