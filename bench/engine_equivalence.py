"""Random requests through the engine, each against what it gives alone.

    python -m bench.engine_equivalence [--backends reference,mlx,torch] [--model demo]
        [--device auto] [--requests 200] [--slots 6] [--chunk 64] [--seed 0]
        [--caches native] [--speculate off] [--restless]

Mixed lengths, arrivals, cancellations, shared beginnings, stop strings, penalties, seeds; guesses
of lengths that pay, or with --restless of random ones. Alone is LLM.generate from an empty state.
An output that differs is explained only if, at the first token that differs, both tokens come out
when the logits are shaken by noise: the backend's arithmetic differs with the shape of a step, and
a native cache rounds what comes out of it. The noise is at most NOISE, or what such a difference is
measured to be beforehand or at that very token. Anything else is an error, and the exit status is
1. Besides, what engine_checks.py says.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import ds4
from ds4 import LLM, Generation, SamplingParams
from ds4.backend import open_backend
from ds4.engine import Engine
from ds4.engine.api import Finished, Progress, Request
from ds4.engine.prefix import PrefixCache
from ds4.sampler import Sampler, pick

from .engine_checks import check
from .policies import Restless

NOISE = 5e-3  # in logits, whose standard deviation over the vocabulary is about 3
LEAST = 1e-6  # of noise that is tried
TRIES, SCALES = 200, 4
SIZES = 64, 40, 20, 3, 1  # of chunks: steps of several shapes
SNAPSHOTS = 4 << 20  # bytes: so few that some are evicted

Numbers = np.random.Generator


@dataclass
class Case:
    """A request, the step at which it comes, and at which it is cancelled, if it is."""

    request: Request
    at: int
    cancelled_at: int | None
    options: dict[str, Any]


@dataclass
class Outcome:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    end: Finished | None = None


def cases(llm: LLM, count: int, rng: Numbers) -> list[Case]:
    """Random requests; half begin as a recent one does."""
    most = llm.context - 80
    made: list[Case] = []
    step = 0
    for number in range(count):
        length = int(rng.choice([3, 20, 70, most])) if rng.random() < 0.3 else rng.integers(1, most)
        prompt = _prompt(llm, int(length), rng, [case.request.prompt for case in made])
        options = _options(rng)
        step += int(rng.integers(0, 6))
        cancelled = step + int(rng.integers(0, 60)) if rng.random() < 0.15 else None
        request = Request(str(number), prompt, SamplingParams(**options), int(rng.integers(0, 3)))
        made.append(Case(request, step, cancelled, options))
    return made


def _prompt(llm: LLM, length: int, rng: Numbers, earlier: list[Any]) -> list[int]:
    tail = rng.integers(3, llm.config.vocab_size - 80, length).tolist()
    if earlier and rng.random() < 0.5:
        before = earlier[-1 - int(rng.integers(min(8, len(earlier))))]
        shared = list(before[: int(rng.integers(1, len(before) + 1))])
        return (shared + tail)[: llm.context - 80]
    return tail


def _options(rng: Numbers) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "stop": ["the", ". "]},
        {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.4},
        {"temperature": 0.8, "top_p": 0.95, "stop": ["and", ","]},
        {"temperature": 1.0, "top_k": 40, "logprobs": 2, "frequency_penalty": 0.3},
        {"temperature": 0.7, "min_p": 0.05, "logit_bias": {1: 4.0, 17: -5.0}},
    ]
    chosen = kinds[int(rng.choice(6, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.1]))]
    return {"max_tokens": int(rng.integers(1, 40)), "seed": int(rng.integers(1 << 40)), **chosen}


def serve(engine: Engine, todo: Iterable[Case]) -> dict[str, Outcome]:
    """Run them all; every request must end exactly once."""
    waiting, outcomes, step = list(todo), dict[str, Outcome](), 0
    cancels = [(case.cancelled_at, case.request.id) for case in waiting if case.cancelled_at]
    while waiting or engine.has_work():
        while waiting and waiting[0].at <= step:
            case = waiting.pop(0)
            engine.submit(case.request)
            outcomes[case.request.id] = Outcome()
        for _, name in [cancel for cancel in cancels if cancel[0] == step]:
            engine.cancel(name)
        for event in engine.step():
            outcome = outcomes[event.id]
            assert outcome.end is None, f"{event.id}: an event after the last"
            if isinstance(event, Progress):
                continue
            outcome.text += event.text
            if isinstance(event, Finished):
                outcome.end = event
            else:
                outcome.tokens += event.tokens
        step += 1
    assert all(outcome.end for outcome in outcomes.values()), "a request was lost"
    stats = engine.stats()
    assert stats.running == stats.waiting == stats.waiting_tokens == 0
    return outcomes


def alone(llm: LLM, case: Case) -> Generation:
    """What a request gives from an empty state."""
    llm._forget()
    return llm.generate(list(case.request.prompt), **{"top_p": 1.0, **case.options})


def noise(many: LLM, one: LLM, rng: Numbers, least: float = NOISE) -> float:
    """How much logits differ with the shape of a step: the worst row's root mean square.

    The same sequences in one chunk each, and in short ones, after which all go on together token by
    token.
    """
    slots = range(min(4, many.runner.slots))
    length = min(160, one.context)
    ids = rng.integers(3, one.config.vocab_size - 80, (len(slots), length)).tolist()
    whole = np.stack([one.logits(row)[length // 4 :] for row in ids], 1)
    runner, rows = many.runner, []
    for slot in slots:
        runner.rewind(slot, 0)
        runner.run({slot: ids[slot][: length // 4]})
    for at in range(length // 4, length):
        logits = runner.run({slot: [ids[slot][at]] for slot in slots})
        rows.append(runner.be.download(logits)[: len(slots)].copy())
    many._forget()
    apart = np.sqrt(((whole - np.stack(rows)) ** 2).mean(-1))
    print(
        f"the shape of a step makes logits differ by {np.median(apart):.1e} (median of "
        f"{apart.size} rows), {np.quantile(apart, 0.95):.1e} (95 %), {apart.max():.1e} (most)",
        flush=True,
    )
    return max(least, float(apart.max()))


def verdict(llm: LLM, case: Case, got: Outcome, want: Generation, noise: float) -> str:
    """Of one request: equal, cancelled, explained or wrong."""
    assert got.end is not None
    if got.end.reason == "cancelled":
        if got.tokens == want.tokens[: len(got.tokens)]:
            return "cancelled"
    elif (got.tokens, got.text, got.end.reason) == (want.tokens, want.text, want.finish_reason):
        return "equal"
    return "explained" if shaken(llm, case.request, got.tokens, want.tokens, noise) else "wrong"


def shaken(
    llm: LLM, request: Request, got: list[int], want: list[int], noise: float, be: Any = None
) -> bool:
    """Whether logits so much or less apart give either token, as the reference or `be` draws.

    Where the two differ first; by what steps of other shapes make of this very text, if it is more.
    """
    pairs = enumerate(zip(got, want, strict=False))
    first = next((n for n, (a, b) in pairs if a != b), min(len(got), len(want)))
    end = llm.config.eos_token_id
    a, b = (tokens[first] if first < len(tokens) else end for tokens in (got, want))
    prompt = list(request.prompt)
    sampler = Sampler(request.params, prompt, llm.config.vocab_size)
    for token in want[:first]:
        sampler.count(token)
    logits, *others = in_shapes(llm, prompt + want[:first])
    here = max(float(np.sqrt(((logits - other) ** 2).mean())) for other in others)
    rng = np.random.default_rng(0)
    # from little to all of it: what moves every logit much hides what moves a few a little
    sizes = np.geomspace(max(here, LEAST), max(noise, here, LEAST), SCALES)
    shakes = [size * rng.normal(size=(TRIES, len(logits))) for size in sizes]
    noisy = np.concatenate([[logits], others, logits + np.concatenate(shakes)]).astype(np.float32)
    be = be or open_backend("reference")
    rows = [(sampler, len(prompt) + first)] * len(noisy)
    picked = set(be.download(pick(be, be.upload(noisy), rows)).tolist())
    if not {a, b} <= picked:
        print(
            f"token {first}: {a} and {b}, logits {logits[a]:.3f} and {logits[b]:.3f} of at most "
            f"{logits.max():.3f}; steps of other shapes move this row by {here:.1e}",
            file=sys.stderr,
        )
    return {a, b} <= picked


def in_shapes(llm: LLM, ids: list[int]) -> list[np.ndarray]:
    """The last token's logits (vocab,) after chunks of several sizes, the largest first."""
    rows = [llm.logits(ids)[-1].copy()]
    for size in SIZES:
        llm._forget()
        for start in range(0, len(ids), size):
            logits = llm.runner.run({0: ids[start : start + size]})
        rows.append(llm.runner.be.download(logits)[0].copy())
    llm._forget()
    return rows


def compare(
    many: LLM, one: LLM, count: int, chunk: int, seed: int, sigma: float = NOISE
) -> Counter[str]:
    """Verdicts on `count` requests through an engine on `many`, each also alone on `one`."""
    todo = cases(one, count, np.random.default_rng(seed))
    engine = Engine(many, chunk=chunk, prefixes=PrefixCache(many.runner, SNAPSHOTS))
    outcomes = serve(engine, todo)
    verdicts: Counter[str] = Counter()
    for case in todo:
        one_verdict = verdict(one, case, outcomes[case.request.id], alone(one, case), sigma)
        verdicts[one_verdict] += 1
        if one_verdict == "wrong":
            print("wrong:", case.options, "prompt of", len(case.request.prompt), file=sys.stderr)
    stats = engine.stats()
    verdicts["reused tokens"] = stats.cached_tokens
    if many.speculator:
        verdicts["guessed tokens"] = stats.drafted_tokens
        verdicts["right guesses"] = stats.accepted_tokens
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description="the engine against one request at a time")
    parser.add_argument("--backends", default="reference,mlx,torch")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--slots", type=int, default=6)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--context", type=int, default=384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--caches", default="native", help="or exact, or both: native,exact")
    parser.add_argument("--speculate", choices=("off", "lookup", "mtp", "auto"), default="off")
    parser.add_argument("--restless", action="store_true", help="guesses of random lengths")
    args = parser.parse_args()
    wrong = 0
    pairs = [(b, c) for b in args.backends.split(",") for c in args.caches.split(",")]
    for backend, cache in pairs:
        start = time.perf_counter()
        options: dict[str, Any] = {"device": args.device, "context": args.context, "cache": cache}
        many = ds4.load(args.model, backend, slots=args.slots, speculate=args.speculate, **options)
        if args.restless and many.speculator is not None:
            many.speculator.policy = Restless(many.speculator.drafter.longest)
        one = ds4.load(args.model, backend, **options)
        sigma = noise(many, one, np.random.default_rng(args.seed))
        try:
            check(many, sigma)
        except AssertionError as error:
            print(f"{backend}: WRONG: {error}", flush=True)
            wrong += 1
        verdicts = compare(many, one, args.requests, args.chunk, args.seed, sigma)
        wrong += verdicts["wrong"]
        seconds = time.perf_counter() - start
        print(
            f"{backend} on {many.device}, {cache}: {dict(verdicts)} in {seconds:.0f} s", flush=True
        )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
