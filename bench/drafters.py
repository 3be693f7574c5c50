"""How often each drafter is right on the demo model, place by place, and what memory it takes.

    python -m bench.drafters [--model demo] [--ways lookup,mtp] [--backend mlx] [--device cpu]
        [--prompts 24] [--tokens 32] [--out bench/results/drafters.jsonl]

Texts go on from places of the demo's held-out text, a few tokens each, so that they stay as varied
as it is; and from passages that were there three times and have begun again. Tokens are greedy;
drawn with a seed, guesses by the same random numbers; or drawn without one, guesses taken by
rejection. Always as many are guessed as the drafter can. A share is of all drafts that had a guess
at that place, right there and before.
"found" is the share of steps in which the drafter guessed at all.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import ds4
from ds4.cache import LayerCache
from ds4.draft.policy import Record
from ds4.draft.speculate import Speculator
from ds4.loader import find_model
from ds4.weights import Checkpoint

from .machine import describe
from .policies import Always, Counted

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn, same numbers": {"temperature": 1.0, "seed": 1},
    "drawn, rejection": {"temperature": 1.0},
}
screen = Console(width=170)


class Asked(Counted):
    """Counts the rounds in which guesses were asked for, too."""

    asked = found = 0

    def learn(
        self,
        records: Sequence[Record],
        asked: Sequence[int],
        guesses: Sequence[int],
        accepted: Sequence[int],
        draft_s: float,
        step_s: float,
    ) -> None:
        self.asked += sum(count > 0 for count in asked)
        self.found += sum(count > 0 for count in guesses)
        super().learn(records, asked, guesses, accepted, draft_s, step_s)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="acceptance by place, and memory, of drafters")
    parser.add_argument("--model", default="demo", help="or one of scripts/train_demo_dspark.py")
    parser.add_argument("--ways", type=lambda text: text.split(","), default=["lookup", "mtp"])
    parser.add_argument("--backend", default="mlx")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", help="append JSON lines")
    args = parser.parse_args(arguments)
    for way in args.ways:
        llm = ds4.load(args.model, args.backend, args.device, context=512, speculate=way)
        assert llm.speculator is not None
        texts = {
            "held-out": held_out(llm, args.prompts),
            "repetitive": again(llm, args.prompts // 2),
        }
        memory = memory_of(llm, args.model)
        name = llm.speculator.drafter.name
        screen.print(f"{name}: {memory}")
        for text, prompts in texts.items():
            for mode, how in MODES.items():
                row: dict[str, Any] = {"bench": "drafters", "way": name, "text": text, "mode": mode}
                row |= measured(llm, prompts, how, args.tokens)
                screen.print(row)
                row |= memory | {"backend": args.backend, **describe(llm.runner.be.device)}
                if args.out:
                    with Path(args.out).open("a") as file:
                        file.write(json.dumps(row) + "\n")


def held_out(llm: ds4.LLM, count: int) -> list[str]:
    text = (find_model("demo") / "heldout.txt").read_text("utf-8")
    return [text[at : at + 300] for at in range(0, len(text) - 300, len(text) // count)][:count]


def again(llm: ds4.LLM, count: int) -> list[str]:
    passages = [text[:150] for text in held_out(llm, count)]
    return [passage * 3 + passage[:30] for passage in passages]


def go_on(llm: ds4.LLM, prompts: Sequence[str], how: dict[str, Any], tokens: int) -> None:
    """Each text, with a seed of its own if it is to have one."""
    for number, prompt in enumerate(prompts):
        seed = {"seed": how["seed"] + number} if "seed" in how else {}
        llm.generate(prompt, max_tokens=tokens, **how | seed)


def measured(
    llm: ds4.LLM, prompts: Sequence[str], how: dict[str, Any], tokens: int
) -> dict[str, Any]:
    assert llm.speculator is not None
    drafter = llm.speculator.drafter
    policy = Asked(Always(drafter.longest))
    llm.speculator = Speculator(llm.runner, drafter, policy)
    go_on(llm, prompts, how, tokens)
    places = range(1, drafter.longest + 1)
    shares = [policy.right_at[n] / policy.made[n] for n in places if policy.made[n]]
    accepted = sum(policy.right_at.values())
    return {
        "right": [round(share, 3) for share in shares],
        "found": round(policy.found / max(policy.asked, 1), 3),
        "tokens_a_draft": round(1 + accepted / max(policy.found, 1), 2),
        "drafts": policy.found,
    }


def memory_of(llm: ds4.LLM, model: str) -> dict[str, int]:
    """Bytes of weights as stored, and of what one sequence keeps on this backend."""
    assert llm.speculator is not None
    drafter, checkpoint = llm.speculator.drafter, Checkpoint(find_model(model))
    weights = checkpoint.check_drafter(llm.config)[1] if drafter.cache else 0
    kept = sum(_rows(cache) for cache in drafter.cache) // llm.runner.slots
    return {"weights_bytes": weights, "sequence_bytes": kept}


def _rows(cache: LayerCache) -> int:
    rings = [ring for ring in (cache.window, cache.streams) if ring is not None]
    parts = (part for ring in rings for part in getattr(ring, "planes", [ring.data]))
    return sum(int(part.nbytes) for part in parts)


if __name__ == "__main__":
    main()
