"""Are guessed texts drawn from the model's distribution? Counted on a vocabulary of five words.

    python -m bench.rejection [--draws 100000] [--backend reference] [--device cpu]
        [--out bench/results/rejection.jsonl]

The model is a table of which word follows which; the drafter is another table, close to it. Texts
are made plainly; with guesses taken by rejection, also up to where a drafter that says how sure it
is is not sure enough; and with guesses of a length that is chosen after they were seen, which is
known to bend the distribution: that one must be found out.
Of each three words and the one before them the table tells the exact chances. `z` is how far
Pearson's chi-square of their counts is from its mean, in standard deviations; "total variation" is
half the sum of what the shares are off, beside what so many draws from the exact chances are off.
Then what it costs: a choice in four rows of a vocabulary of the real size, plain and by rejection.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from ds4.backend import open_backend
from ds4.draft.drafter import Ask, Draft, Drawing
from ds4.draft.lookup import Lookup
from ds4.draft.policy import Policy
from ds4.draft.speculate import Speculator, Turn
from ds4.sampler import Sampler, SamplingParams, weighed

from .machine import describe

WORDS, LONGEST, SLOTS = 5, 3, 100
ROWS, VOCABULARY, REPEATS = 4, 129_280, 5
STRAY = 4.5  # standard deviations that are no accident
Table = NDArray[np.float64]


def tables(seed: int = 0) -> tuple[Table, Table]:
    """(V, V) how likely each word follows each, by the model and by the drafter."""
    rng = np.random.default_rng(seed)
    logits = 1.2 * rng.standard_normal((WORDS, WORDS))
    off = np.where(np.arange(WORDS) % 2, 0.3, 2.0)[:, None]  # after even words it is less like it
    near = logits + off * rng.standard_normal((WORDS, WORDS))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits, near))
    return p, q


class Words:
    """What a Speculator asks of a Runner, over a table."""

    context = 1 << 30

    def __init__(self, be: Any, table: Table) -> None:
        self.be, self.logits = be, np.log(table).astype(np.float32)

    def attach(self, drafter: Any) -> None: ...

    def rewind(self, slot: int, length: int) -> None: ...

    def run(self, chunks: Mapping[int, Sequence[int]], pad_to: int, every_row: bool) -> Any:
        rows = [token for tokens in chunks.values() for token in tokens]
        return self.be.upload(self.logits[rows])


class Near(Lookup):
    """Draws guesses from the drafter's table."""

    def __init__(self, words: Words, table: Table) -> None:
        super().__init__(LONGEST)
        self.be: Any = words.be
        self.logits = np.log(table).astype(np.float32)

    def propose(self, asks: Sequence[Ask]) -> Draft:
        drawing, last = Drawing(self.be, asks), np.array([ask.text[-1] for ask in asks])
        said = []
        for _ in range(max(ask.count for ask in asks)):
            said.append(self.sure(last))
            last = self.be.download(drawing.next(self.be.upload(self.logits[last])))
        words = [self.be.upload(one) for one in said if one is not None]
        return self.ended(drawing.draft(words))

    def sure(self, last: NDArray[Any]) -> NDArray[Any] | None:
        return None

    def ended(self, draft: Draft) -> Draft:
        return draft


class Saying(Near):
    """Says how sure it is, by the word before."""

    def sure(self, last: NDArray[Any]) -> NDArray[Any] | None:
        return np.where(last % 2, 3.0, -1.0).astype(np.float32)


class Seeing(Near):
    """Has no guesses at all where the first one is an odd word."""

    def ended(self, draft: Draft) -> Draft:
        return draft.cut([0 if guess and guess[0] % 2 else LONGEST for guess in draft.guesses])


class Simulated(Policy):
    """The policy in made-up time, in which rows are cheap enough to be worth guesses.

    `cut` counts guesses that were drawn and not verified, as the drafter was not sure of them.
    """

    cut = 0

    def kept(self, asked: Sequence[int], sure: Sequence[Sequence[float]]) -> list[int]:
        kept = super().kept(asked, sure)
        self.cut += sum(asked) - sum(kept)
        return kept

    def learn(
        self,
        records: Any,
        asked: Any,
        guesses: Any,
        accepted: Any,
        draft_s: float,
        step_s: float,
    ) -> None:
        rows = len(guesses) + sum(guesses)
        super().learn(records, asked, guesses, accepted, 0.01, 1 + 0.3 * rows / len(guesses))


class Plain(Policy):
    def lengths(self, records: Sequence[Any], most: Sequence[int]) -> list[int]:
        return [0] * len(records)


def draw(be: Any, draws: int, policy: Policy, drafter: type[Near], seed: int) -> Any:
    """Runs of `draws` words after another, (n, LONGEST + 1), and the Speculator that made them."""
    p, q = tables()
    words: Any = Words(be, p)
    speculator = Speculator(words, drafter(words, q), policy)
    each = -(-draws // SLOTS // LONGEST) * LONGEST  # words of each text
    texts = [[slot % WORDS] for slot in range(SLOTS)]
    samplers = [Sampler(SamplingParams(), [], WORDS) for _ in texts]
    for slot, sampler in enumerate(samplers):
        sampler.seed = seed * SLOTS + slot  # as if secrets had drawn it
    records = [policy.record() for _ in texts]
    while min(map(len, texts)) <= each:
        turns = [
            Turn(slot, text, samplers[slot], 1 << 20, records[slot])
            for slot, text in enumerate(texts)
        ]
        for text, came in zip(texts, speculator.round(turns), strict=True):
            text += came.tokens
    runs = [text[at : at + LONGEST + 1] for text in texts for at in range(0, each, LONGEST)]
    return np.array(runs), speculator


def judged(runs: NDArray[Any]) -> dict[str, float]:
    """How far the counts of runs are from the table's chances."""
    p, _ = tables()
    counts = np.zeros((WORDS,) * (LONGEST + 1))
    np.add.at(counts, tuple(runs.T), 1)
    chances = p[:, :, None, None] * p[None, :, :, None] * p[None, None, :, :]
    begun = counts.sum((1, 2, 3), keepdims=True)
    expected = begun * chances
    chi = float(((counts - expected) ** 2 / expected).sum())
    free = WORDS * (WORDS**LONGEST - 1)
    variance = 2 * free + float((1 / expected).sum())  # of few draws a cell
    noise = np.sqrt(2 * expected * (1 - chances) / np.pi).sum() / 2 / len(runs)
    return {
        "z": round((chi - free) / variance**0.5, 2),
        "total_variation": round(float(np.abs(counts - expected).sum()) / 2 / len(runs), 4),
        "of_exact_draws": round(float(noise), 4),
    }


WAYS: dict[str, tuple[type[Policy], type[Near]]] = {
    "plain": (Plain, Near),
    "rejection": (Simulated, Near),
    "rejection, by confidence": (Simulated, Saying),
    "length chosen after seeing": (Simulated, Seeing),
}


def cost(be: Any) -> dict[str, float]:
    """Milliseconds of choosing in ROWS rows of VOCABULARY logits."""
    rng = np.random.default_rng(0)
    logits = [be.upload(rng.standard_normal((ROWS, VOCABULARY), np.float32)) for _ in range(2)]
    guesses = be.upload(np.arange(ROWS, dtype=np.int32))
    numbers = be.upload(np.full(ROWS, 0.5, np.float32))
    found = {}
    for name, top_p in (("all", 1.0), ("top_p 0.95", 0.95)):
        chosen = [(Sampler(SamplingParams(top_p=top_p), [], VOCABULARY), n) for n in range(ROWS)]
        args = [weighed(be, x, chosen) for x in logits]

        def plain(args: Any = args) -> Any:
            return be.sample(*args[0], numbers)

        def by_rejection(args: Any = args) -> Any:
            return be.settle(*(be.chances(*x) for x in args), guesses, numbers, numbers)

        for way, call in (("plain", plain), ("by rejection", by_rejection)):
            for _ in range(3):
                be.download(call())
            start = time.perf_counter()
            for _ in range(REPEATS):
                be.download(call())
            found[f"{way}, {name}"] = round((time.perf_counter() - start) / REPEATS * 1e3, 3)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="guessed texts against the model's distribution")
    parser.add_argument("--draws", type=int, default=100_000)
    parser.add_argument("--out", help="append JSON lines")
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    be: Any = open_backend(args.backend, args.device)
    screen, failed = Console(width=150), False
    about = {"bench": "rejection", "backend": args.backend}
    for way, (policy, drafter) in WAYS.items():
        runs, speculator = draw(be, args.draws, policy(LONGEST), drafter, seed=1)
        row = about | {"way": way, "draws": runs.size - len(runs), **judged(runs)}
        row |= {"guessed": speculator.tally.drafted_tokens}
        row |= {"accepted": speculator.tally.accepted_tokens}
        row |= {"cut": getattr(speculator.policy, "cut", 0)}
        screen.print(row)
        failed |= (row["z"] > STRAY) != (drafter is Seeing)
        failed |= drafter is Saying and not row["cut"]
        if args.out:
            with Path(args.out).open("a") as file:
                file.write(json.dumps(row | describe(be.device)) + "\n")
    screen.print(cost(be))
    sys.exit(failed)


if __name__ == "__main__":
    main()
