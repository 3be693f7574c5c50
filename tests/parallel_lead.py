"""Rank 0 of tests/test_parallel.py: prints what the model computes, then generates until it ends.

python -m tests.parallel_lead FOLDER GPUS
"""

import json
import sys
from typing import Any

import numpy as np

import ds4
from ds4.draft.drafter import Ask
from ds4.engine import snapshot
from ds4.runner import Runner
from ds4.sampler import Sampler, SamplingParams
from tests.test_speculate import Always

IDS = [3, 14, 15, 92, 65, 35, 8, 9, 79]


def results(llm: Any) -> dict[str, Any]:
    """Of a prompt, a greedy text, and two sequences decoded together by a runner of its own."""
    first = llm.runner
    other = Runner(first.be, first.cfg, first.weights, context=64, slots=2, max_chunk=16)
    other.run({0: IDS[:4], 1: IDS})
    both = first.be.download(other.run({0: [5], 1: [6]}, pad_to=4))
    ending = snapshot.save_ending(other, 1, 0, len(IDS) + 1)
    snapshot.restore_ending(other, 0, 0, len(IDS) + 1, ending)
    numbers = [np.zeros(2, np.int32 if i == 1 else np.float32) for i in range(5)]  # greedy
    ahead = first.be.sample(other.run({0: [9], 1: [8]}), *map(first.be.upload, numbers))
    snapshot.fork(other, 0, 1, len(IDS) + 2)
    ahead = first.be.download(other.run_ahead([0, 1], ahead))
    logits, drafter = llm.logits(IDS).tolist(), llm.speculator.drafter
    llm.speculator.policy = Always(2)
    greedy = Sampler(SamplingParams(temperature=0), [], first.cfg.vocab_size)
    return {
        "logits": logits,
        "guesses": drafter.propose([Ask(0, [*IDS, 5], 3, greedy)]).guesses,
        "tokens": llm.generate(IDS, max_tokens=12, temperature=0).tokens,
        "guessed": llm.speculator.tally.drafted_tokens,
        "both": both.tolist(),
        "ahead": ahead.tolist(),
    }


def main(folder: str, gpus: int) -> None:
    options: dict[str, Any] = {"context": 128, "gpus": gpus, "speculate": "mtp"}
    llm = ds4.load(folder, "torch", "cpu", "exact", **options)
    ranks: Any = llm.runner.be.ranks  # type: ignore[attr-defined]
    held = llm.runner.weights.layers[0].ffn.experts.w1.ids
    children = [child.pid for child in ranks.crew.children]
    found = results(llm) | {"held": held, "children": children}
    if gpus == 2:  # another model in the same processes, which guesses as well
        again = ds4.load(folder, "torch", "cpu", "exact", **options)
        assert again.speculator is not None
        again.speculator.policy = Always(2)
        found["again"] = again.generate(IDS, max_tokens=12, temperature=0).tokens
    print(json.dumps(found), flush=True)
    while True:
        llm.generate(IDS, max_tokens=100)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
