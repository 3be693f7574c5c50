"""What DSpark's word about its guesses is worth: real drafts, against times of a real machine.

    python -m bench.confidence --model build/demo_dspark [--backend mlx] [--device cpu]
        [--prompts 30] [--tokens 100] [--out bench/results/confidence.jsonl]

A small model's drafter (scripts/train_demo_dspark.py) always guesses a whole block, in texts as of
bench.drafters: what it says of each guess and how many were right is written down. Of each place:
how often the guess was right if those before it were, what the drafter said, how often it said more
of a right guess than of a wrong one, and the squared errors of its word and of one that is always
the share of right ones. Then the same drafts at the times that steps and drafts of the real model
take on an H100 (bench.speculate): tokens a second with each fixed length, with the policy that
knows the past only, and with the one that listens; of texts of LENGTH tokens in new processes, of
the next text in each, and of a long one.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import ds4
from ds4.draft.policy import Policy, Record
from ds4.draft.speculate import Speculator

from .drafters import MODES, again, go_on, held_out
from .machine import describe
from .policies import Always

# milliseconds of a step of 1 to 6 rows, and of 0 to 5 guesses
MACHINES = {
    "H100": ((5.70, 7.31, 8.81, 10.12, 11.43, 12.84), (0, 1.15, 1.29, 1.41, 1.33, 1.46)),
    "drafts nearly free": ((5.70, 7.31, 8.81, 10.12, 11.43, 12.84), (0, *[0.2] * 5)),
    "rows dear": ((6.0, 9.0, 12.0, 15.0, 18.0, 21.0), (0, *[1.2] * 5)),
}
LENGTH, TEXTS, LONG = 400, 6, 8000
Drafts = list[tuple[list[float], int]]  # what was said of each guess, and how many were right
screen = Console(width=150)


class Traced(Always):
    """Guesses all it can, and notes each whole draft."""

    def __init__(self, longest: int) -> None:
        super().__init__(longest)
        self.drafts: Drafts = []

    def kept(self, asked: Sequence[int], sure: Sequence[Sequence[float]]) -> list[int]:
        return list(asked)

    def learn_sure(
        self,
        records: Sequence[Record],
        sure: Sequence[Sequence[float]],
        guessed: Sequence[int],
        accepted: Sequence[int],
    ) -> None:
        for said, made, right in zip(sure, guessed, accepted, strict=True):
            if made == self.longest:
                self.drafts.append((list(said), right))


@dataclass
class Replay:
    """Drafts one after another at a machine's times, by a policy or of a fixed length."""

    drafts: Drafts
    steps: Sequence[float]
    costs: Sequence[float]
    at: int = 0
    made: list[int] = field(default_factory=list)  # how often so many guesses were verified

    def speed(self, policy: Policy | int, listens: bool = False, tokens: int = LENGTH) -> float:
        """Tokens a second of one text."""
        self.made = [0] * len(self.steps)
        record = policy.record() if isinstance(policy, Policy) else Record([])
        total, brought = 0.0, 0
        while brought < tokens:
            said, could = self.drafts[self.at % len(self.drafts)]
            self.at += 1
            asked = kept = policy if isinstance(policy, int) else self._asked(policy, record)
            said = said[:asked]
            if isinstance(policy, Policy) and listens and asked:
                (kept,) = policy.kept([asked], [said])
            right, draft, step = min(kept, could), self.costs[asked], self.steps[kept]
            if isinstance(policy, Policy):
                if listens and asked:
                    policy.learn_sure([record], [said], [kept], [right])
                policy.learn([record], [asked], [kept], [right], draft / 1e3, step / 1e3)
            self.made[kept] += 1
            total, brought = total + draft + step, brought + right + 1
        return brought / total * 1e3

    def _asked(self, policy: Policy, record: Record) -> int:
        return policy.lengths([record], [policy.longest])[0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="what a drafter's word is worth")
    parser.add_argument("--model", required=True, help="with a DSpark drafter")
    parser.add_argument("--backend", default="mlx")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--out", help="append JSON lines")
    args = parser.parse_args(arguments)
    llm = ds4.load(args.model, args.backend, args.device, context=512, speculate="mtp")
    assert llm.speculator is not None
    drafter = llm.speculator.drafter
    assert drafter.name == "dspark", f"{args.model} has no DSpark drafter"
    texts = {"held-out": held_out(llm, args.prompts), "repetitive": again(llm, args.prompts // 2)}
    for text, prompts in texts.items():
        for mode, how in MODES.items():
            policy = Traced(drafter.longest)
            llm.speculator = Speculator(llm.runner, drafter, policy)
            go_on(llm, prompts, how, args.tokens)
            common = {"bench": "confidence", "text": text, "mode": mode} | describe("cpu")
            for row in rows(policy.drafts, drafter.longest):
                screen.print({"text": text, "mode": mode} | row)
                if args.out:
                    with Path(args.out).open("a") as file:
                        file.write(json.dumps(common | row) + "\n")


def rows(drafts: Drafts, longest: int) -> list[dict[str, Any]]:
    said = np.array([one for one, _ in drafts])
    right = np.array([one for _, one in drafts])
    found = []
    for place in range(longest):
        seen = right >= place  # those before it were right
        found.append(word(said[seen, place], (right[seen] > place).astype(float)))
    table: list[dict[str, Any]] = [{"kind": "word", "places": found}]
    for machine, (steps, costs) in MACHINES.items():
        fixed = [Replay(drafts, steps, costs).speed(n, tokens=LONG) for n in range(longest + 1)]
        row = {"kind": "replay", "machine": machine, "fixed": [round(x, 1) for x in fixed]}
        for name, listens in (("past", False), ("word", True)):
            row |= {f"by_{name}_{k}": v for k, v in replayed(drafts, steps, costs, listens).items()}
        table.append(row)
    return table


def word(said: NDArray[Any], was: NDArray[Any]) -> dict[str, Any]:
    """Of one place; chances said, and 1 for what was right."""
    good, bad = said[was == 1], said[was == 0]
    above = (good[:, None] > bad).mean() + (good[:, None] == bad).mean() / 2
    return {
        "drafts": len(was),
        "right": round(float(was.mean()), 3),
        "said": round(float(said.mean()), 3),
        "above": round(float(above), 3),
        "error": round(float(((said - was) ** 2).mean()), 3),
        "error_of_share": round(float(was.var()), 3),
    }


def replayed(
    drafts: Drafts, steps: Sequence[float], costs: Sequence[float], listens: bool
) -> dict[str, Any]:
    first, later = [], []
    for number in range(TEXTS):
        policy = Policy(len(costs) - 1, alike=True)
        replay = Replay(drafts, steps, costs, at=number * len(drafts) // TEXTS)
        first.append(replay.speed(policy, listens))
        later.append(replay.speed(policy, listens))
    replay = Replay(drafts, steps, costs)
    long = replay.speed(Policy(len(costs) - 1, alike=True), listens, LONG)
    return {
        "first": round(fmean(first), 1),
        "next": round(fmean(later), 1),
        "long": round(long, 1),
        "verified": [round(count / sum(replay.made), 2) for count in replay.made],
    }


if __name__ == "__main__":
    main()
