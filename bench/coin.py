"""Text made with guesses that are right if a coin says so: how fast it comes.

All the work of rounds is done. What a round brings is counted as the coin brings it on average, so
that its luck is not in the speeds, and all ways have the same coins. A step without guesses begins
ahead of the host, as in LLM. Tokens are new in every text: with experts in host memory one that was
just made would be fast. Where routing is skewed, three of ten are the token before, in any text.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ds4.draft.drafter import Ask, Draft
from ds4.draft.lookup import Lookup
from ds4.draft.speculate import Round, Speculator, Turn
from ds4.runner import Runner
from ds4.sampler import Sampler, SamplingParams, pick

from .models import REPETITION, Model
from .policies import Always

ROWS = 6  # of a sequence in a step, at most
STRETCH = 64  # tokens for which a mixed text is alike
MIXED = (0.9, 0.2, 0.7, 0.5, 0.0)  # chances of its stretches
SETTLE = 32  # plain steps of another text before one that is timed, with experts in host memory
BLOCK = 10  # tokens of which as many are the one before as should be
GREEDY = SamplingParams(temperature=0.0)


class Script:
    """What a text will say, and which guesses are right; `at` is the token the model sees next.

    `first` is its first stretch.
    """

    def __init__(
        self, model: Model, stretches: Sequence[float], seed: int = 0, first: int = 0
    ) -> None:
        self.model, self.stretches, self.first, self.at = model, stretches, first, 0
        self.rng = np.random.default_rng(seed)
        self.others = random.Random(model.tokens(1)[0])  # new ones in every text, soon drawn
        self.tokens = list[int]()
        self.coins = list[float]()

    @property
    def chance(self) -> float:
        return self.stretches[(self.first + self.at // STRETCH) % len(self.stretches)]

    def ahead(self, count: int) -> list[int]:
        """The next tokens of the text."""
        while len(self.tokens) < self.at + count:
            again = np.zeros(BLOCK, bool)
            if self.model.synthetic.routing == "skewed":
                again[self.rng.permutation(BLOCK)[: round(REPETITION * BLOCK)]] = True
            for same, coin in zip(again, self.rng.random(BLOCK), strict=True):
                self.tokens.append(self.tokens[-1] if same and self.tokens else self.other())
                self.coins.append(coin)
        return self.tokens[self.at : self.at + count]

    def other(self) -> int:
        return self.others.randrange(3, self.model.cfg.vocab_size)

    def guesses(self, count: int) -> tuple[list[int], int]:
        """So many, and how many of them are right."""
        _, *text = self.ahead(count + 1)
        coins = self.coins[self.at + 1 : self.at + 1 + count]
        right = next((n for n, coin in enumerate(coins) if coin >= self.chance), count)
        return text[:right] + [self.other() for _ in range(count - right)], right


class Coin(Lookup):
    """It takes no time to guess; what, a script says."""

    name = "coin"

    def __init__(self) -> None:
        super().__init__(ROWS - 1)

    def propose(self, asks: Sequence[Ask]) -> Draft:
        return Draft([[0] * ask.count for ask in asks])


class Tossed(Speculator):
    """Guesses are those of scripts; all the work is done as if they were checked.

    `brought` is how many tokens rounds bring on average, summed.
    """

    scripts: Sequence[Script]
    brought = 0.0

    def _verify(self, turns: Sequence[Turn], draft: Draft) -> list[Round]:
        each = list(zip(self.scripts, draft.guesses, strict=True))
        tosses = [script.guesses(len(guess)) for script, guess in each]
        super()._verify(turns, replace(draft, guesses=[guess for guess, _ in tosses]))
        rounds = []
        for turn, script, (guess, right) in zip(turns, self.scripts, tosses, strict=True):
            self.runner.lengths[turn.slot] = len(turn.text) + right
            self.brought += brings(script.chance, len(guess))
            rounds.append(Round([turn.text[-1], *guess][: right + 1], len(guess)))
        return rounds


def brings(chance: float, guesses: int) -> float:
    """Tokens of a round, on average."""
    return sum(chance**n for n in range(guesses + 1))


def text_row(
    model: Model,
    runner: Runner,
    drafter: Any,
    chance: float | str,
    rounds: Sequence[float],
    tokens: int,
    texts: int,
    most: int,
) -> dict[str, Any]:
    """Tokens a second of plain steps, of lengths up to `most`, and of `texts` policies.

    A policy makes two texts: one knowing nothing, and the next. Each text has coins of its own, as
    luck with the first guesses decides much of what a policy does with it; plain steps make all of
    these texts too, and fixed lengths those of the first kind.
    `rounds` are milliseconds with 0, 1 ... guesses, from which follows what is to be expected.
    """
    most, batch = min(drafter.longest, most), runner.slots
    stretches = MIXED if isinstance(chance, str) else (chance,)
    period = STRETCH * len(stretches) if isinstance(chance, str) and batch == 1 else 1
    many = max(1, tokens // period) * period

    def speed(speculator: Tossed, tokens: int, seed: int = 0) -> float:
        def scripts(seed: int) -> list[Script]:
            return [Script(model, stretches, batch * seed + n, n) for n in range(batch)]

        if getattr(model.be, "placement", None) is not None:  # let it forget the text before
            run_text(Tossed(runner, drafter, Always(0)), scripts(2 * texts), SETTLE)
        return run_text(speculator, scripts(seed), tokens)

    want = {}
    for count in range(most + 1):
        times = [rounds[count] / brings(one, count) for one in stretches]
        want[str(count)] = 1e3 * batch / statistics.fmean(times)
    fixed = [Tossed(runner, drafter, Always(count)) for count in range(most + 1)]
    for count in range(min(drafter.longest, ROWS - 1) + 1):  # compile and record
        scripts = [Script(model, (1.0,), n) for n in range(batch)]
        run_text(Tossed(runner, drafter, Always(count)), scripts, 3 * (count + 1))
    adaptive = [Tossed(runner, drafter, None) for _ in range(texts)]
    plain, first, later = list[float](), list[float](), list[float]()
    got = [list[float]() for _ in range(most)]
    for seed in range(2 * texts):  # in turn, since a machine's speed drifts
        plain.append(speed(fixed[0], many, seed))
        for speeds, one in zip(got, fixed[1:], strict=True) if seed < texts else ():
            speeds.append(speed(one, max(period, tokens // 2), seed))
        (first if seed < texts else later).append(speed(adaptive[seed % texts], many, seed))
    means = [statistics.fmean(speeds) for speeds in (plain, *got)]
    adapted = statistics.fmean(first), statistics.fmean(later)
    return {
        "tok_s": {str(count): round(one, 1) for count, one in enumerate(means)},
        "plain_tok_s": [round(one, 1) for one in plain],
        "model_tok_s": {name: round(one, 1) for name, one in want.items()},
        "adaptive_tok_s": [[round(one, 1) for one in each] for each in (first, later)],
        "of_best_fixed": [round(one / max(means), 3) for one in adapted],
        "of_plain": [round(one / means[0], 3) for one in adapted],
        "tokens": many,
    }


def run_text(speculator: Tossed, scripts: Sequence[Script], tokens: int) -> float:
    """Tokens a second, all sequences together, which make so many each on average."""
    text = Text(speculator, scripts)
    for script in scripts:
        script.ahead(2 * tokens + 2 * ROWS)  # not while time is taken
    since, begun = speculator.brought, time.perf_counter()
    while sum(script.at for script in scripts) < tokens * len(scripts):
        text.go_on()
    text.wait()
    return (speculator.brought - since) / (time.perf_counter() - begun)


class Text:
    """Sequences that step together. Steps without guesses begin ahead, as in LLM."""

    def __init__(self, speculator: Tossed, scripts: Sequence[Script]) -> None:
        self.speculator, self.runner, self.scripts = speculator, speculator.runner, scripts
        self.sampler = Sampler(GREEDY, [], scripts[0].model.cfg.vocab_size)
        self.records = [speculator.policy.record() for _ in scripts]
        self.start = self.runner.context // 2
        self.lengths = [self.start] * len(scripts)
        self.stepped = 0.0  # when the last step ended, if it was plain
        self.pending: Any = None  # what a plain step chose, on the device
        speculator.scripts = scripts

    def go_on(self) -> None:
        """A round, or a plain step."""
        most, speculator = self.runner.context - 2 * ROWS, self.speculator
        self.lengths = [self.start if length > most else length for length in self.lengths]
        self.runner.lengths = list(self.lengths)
        each = zip(self.lengths, self.scripts, self.records, strict=True)
        turns = [
            Turn(slot, [7] * length + script.ahead(1), self.sampler, ROWS, record)
            for slot, (length, script, record) in enumerate(each)
        ]
        came = [1] * len(turns)
        asked = speculator.lengths(turns)
        if not any(asked):
            self.plain(turns)
        else:
            self.wait()
            came = [len(one.tokens) for one in speculator.round(turns, asked)]
        for slot, count in enumerate(came):
            self.scripts[slot].at += count
            self.lengths[slot] += count

    def plain(self, turns: Sequence[Turn]) -> None:
        be = self.runner.be
        tokens = be.upload(np.array([turn.text[-1] for turn in turns], np.int32))
        logits = self.runner.run_ahead([turn.slot for turn in turns], tokens)
        picked = pick(be, logits, [(self.sampler, len(turn.text)) for turn in turns])
        if self.pending is not None:
            be.download(self.pending)
            now = time.perf_counter()
            if self.stepped:
                self.speculator.stepped(turns, now - self.stepped)
            self.stepped = now
        self.pending = picked
        self.speculator.brought += len(turns)

    def wait(self) -> None:
        if self.pending is not None:
            self.runner.be.download(self.pending)
        self.pending, self.stepped = None, 0.0
