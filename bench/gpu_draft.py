"""Drafters on a GPU: the kernels beside PyTorch's plain operations, on small random models.

    python -m bench.gpu_draft [--kinds mtp,dspark] [--modes exact,native] [--device cuda]

Prompts in short and in long chunks, decoding, then what the drafter says, run three times: as it
is, recorded and replayed. Relative errors of its logits, and whether guesses are the same. Then
texts with guesses, always as many as can be, beside texts without (bench.lossless).
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ds4
from ds4.backend import CacheMode, open_backend
from ds4.config import Config
from ds4.draft.drafter import Ask, Draft
from ds4.draft.dspark import Dspark
from ds4.draft.mtp import Mtp
from ds4.runner import Runner
from ds4.sampler import Sampler, SamplingParams
from ds4.step import Chunk, plan
from ds4.weights import Checkpoint, load_weights
from ds4.weights.load import load_drafter
from ds4.weights.names import Drafter, expected_drafter
from tests.fixtures import plain_tensors, random_official_state, small_config, values, write_folder

from .engine_equivalence import noise
from .lossless import LEAST, near_tie
from .policies import Always

CHUNK, CONTEXT = 64, 256
KINDS: tuple[Drafter, ...] = ("mtp", "dspark")
MODES: tuple[CacheMode, ...] = ("exact", "native")
LARGEST = {"exact": 1e-2, "native": 1e-1}  # error that is no mistake: activations are fp16
CALM = {"num_experts_per_tok": 8, "index_topk": 64}  # all there are: rounding chooses nothing
DSPARK = {
    "dspark_target_layer_ids": [2, 4, 6],
    "dspark_markov_rank": 128,
    "dspark_noise_token_id": 511,
}


def make(folder: Path, kind: Drafter) -> None:
    fields = small_config(**DSPARK, **CALM)
    rng, cfg = np.random.default_rng(5), Config.from_dict(fields)
    state = random_official_state(fields, 3)
    state |= {name: values(name, s, cfg, rng) for name, s in expected_drafter(cfg, kind).items()}
    write_folder(folder, fields, plain_tensors(state))


def said(
    folder: Path, backend: str, device: str, mode: CacheMode
) -> Iterator[tuple[str, np.ndarray]]:
    """The model's logits, the drafter's, and its guesses."""
    be: Any = open_backend(backend, device, mode)
    cfg, checkpoint = Config.from_file(folder / "config.json"), Checkpoint(folder)
    weights, own = load_weights(be, cfg, checkpoint), load_drafter(be, cfg, checkpoint)
    runner = Runner(be, cfg, weights, CONTEXT, 2, CHUNK)
    drafter: Any = (Mtp if own.kind == "mtp" else Dspark)(runner, own)
    runner.attach(drafter)
    rng = np.random.default_rng(0)
    text = [rng.integers(2, 500, 120).tolist() for _ in range(2)]
    at = [0, 0]

    def run(each: dict[int, int]) -> np.ndarray:
        chunks = {slot: text[slot][at[slot] : at[slot] + n] for slot, n in each.items()}
        for slot, count in each.items():
            at[slot] += count
        logits: np.ndarray = be.download(runner.run(chunks, every_row=True)).copy()
        return logits

    yield "prompt", np.concatenate([run({0: 60}), run({0: 9, 1: 21}), run({1: 3})])
    for _ in range(4):
        yield "decode", run({0: 1, 1: 1})
    none = Sampler(SamplingParams(temperature=0.0), [], cfg.vocab_size)
    for times in ("eager", "recorded", "replayed"):
        if own.kind == "mtp":
            chunks = [Chunk(slot, at[slot], text[slot][at[slot] :][:1]) for slot in range(2)]
        else:
            noise = [cfg.dspark.noise_token] * (cfg.dspark.block_size - 1)
            chunks = [Chunk(s, at[s], [*text[s][at[s] :][:1], *noise]) for s in range(2)]
        step = plan(chunks, [], every_row=True)
        got = drafter.follow(step)
        for part in got if isinstance(got, tuple) else (got,):
            yield f"drafter, {times}", be.download(part).copy()
    for size in (1, 2):
        asks = [Ask(slot, text[slot][: at[slot] + 1], 5, none) for slot in range(size)]
        for times in ("once", "again", "thrice"):
            made = drafter.propose(asks)
            yield f"guesses, {size}, {times}", np.array(made.guesses)
    if own.kind == "dspark":  # logits: probabilities of a random model are mostly 0 or 1
        base, hidden = got
        rows, tokens = (be.upload(np.array(x, np.int32)) for x in ([3, 7], [11, 12]))
        _, sure = be.markov(own, be.take(base, rows), be.take(hidden, rows), tokens)
        yield "confidence", be.download(sure)


class Better:
    """A drafter, two of three of whose guesses are what comes."""

    def __init__(self, drafter: Any, text: list[int], rng: np.random.Generator) -> None:
        self._drafter, self._text, self._rng = drafter, text, rng

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)

    def propose(self, asks: Sequence[Ask]) -> Draft:
        (guess,), (ask,) = self._drafter.propose(asks).guesses, asks
        known = self._text[len(ask.text) :]
        pairs = zip(guess, known, strict=False)
        return Draft([[right if self._rng.random() < 2 / 3 else own for own, right in pairs]])


def texts(folder: Path, backend: str, device: str) -> int:
    """Prints how many are the same; returns how many differ by more than rounding."""
    options: dict[str, Any] = {"cache": "exact", "context": CONTEXT}
    plain = ds4.load(folder, backend, device, **options)
    llm = ds4.load(folder, backend, device, **options, speculate="mtp")
    rng, same, ties, unlike = np.random.default_rng(1), 0, 0, 0
    sigma = noise(plain, plain, rng, LEAST)
    assert llm.speculator is not None
    drafter = llm.speculator.drafter
    llm.speculator.policy = Always(drafter.longest)
    for number in range(4):
        prompt = rng.integers(2, 500, 5 + 40 * number).tolist()
        how: dict[str, Any] = {"temperature": number % 2 * 1.0, "seed": number}
        want = plain.generate(prompt, max_tokens=60, **how).tokens
        llm.speculator.drafter = Better(drafter, [*prompt, *want], rng)
        got = llm.generate(prompt, max_tokens=60, **how).tokens
        if got == want:
            same += 1
        elif near_tie(plain, prompt, how, got, want, sigma):
            ties += 1
        else:
            unlike += 1
    tally = llm.speculator.tally
    print(f"texts: {same} the same, {ties} a near tie, {unlike} WRONG; noise {sigma:.1e}; {tally}")
    return unlike


def main() -> None:
    parser, wrong = argparse.ArgumentParser(description="drafters on a GPU"), 0
    parser.add_argument("--kinds", type=lambda s: s.split(","), default=KINDS)
    parser.add_argument("--modes", type=lambda s: s.split(","), default=MODES)
    parser.add_argument("--backend", default="cuda", help="reference, to try the script")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as name:
            make(Path(name), kind)
            wrong += texts(Path(name), args.backend, args.device)
            for mode in args.modes:
                pairs = zip(
                    said(Path(name), args.backend, args.device, mode),
                    said(Path(name), "torch", args.device, mode),
                    strict=True,
                )
                for (what, got), (_, want) in pairs:
                    error = float(np.abs(got - want).max() / np.abs(want).max())
                    bad = "guesses" not in what and not error < LARGEST[mode]
                    wrong += bad
                    alike = f"{(got == want).mean():.0%} alike" if "guesses" in what else ""
                    print(f"{kind} {mode} {what}: {error:.1e} {alike}{' WRONG' * bad}", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
