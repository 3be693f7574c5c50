"""The packaged demo model: the same text on every backend, and transformers' perplexity."""

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

import ds4
from ds4.config import Config
from ds4.errors import PromptError
from ds4.llm import LLM
from ds4.runner import Runner
from tests import oracle

DEMO = Path(str(resources.files("ds4") / "demo"))
NEAR_TIE = 0.15  # how far rounding to FP8 and FP4 codes may move one logit against another


def load(backend: str, cache: str = "exact") -> LLM:
    return ds4.load("demo", backend, cache=cache, context=1024)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def greedy() -> list[int]:
    return load("reference").generate("Once upon a time", max_tokens=64, temperature=0).tokens


def test_it_fits_the_package() -> None:
    total = sum(file.stat().st_size for file in DEMO.iterdir() if file.is_file())
    assert total <= 18e6  # the MTP block is 1.6e6 of them


def test_it_has_every_branch_of_the_real_model() -> None:
    cfg = Config.from_file(DEMO / "config.json")
    ratios = set(cfg.compress_ratios)
    assert {0, 4} < ratios
    assert len(ratios) == 3
    assert 0 < cfg.num_hash_layers < cfg.num_hidden_layers
    assert cfg.compress_ratios[cfg.num_hash_layers - 1] == 4
    assert cfg.rope_scaling is not None
    assert (cfg.hc_mult, cfg.n_shared_experts) == (4, 1)
    assert cfg.n_routed_experts >= 16


def test_greedy_text_is_the_same_everywhere(backend: str, greedy: list[int]) -> None:
    found = load(backend).generate("Once upon a time", max_tokens=64, temperature=0).tokens
    assert len(greedy) == 64
    assert found == greedy


def test_sampled_text_is_the_same_everywhere(backend: str) -> None:
    options = {"max_tokens": 40, "temperature": 0.9, "top_p": 0.95, "seed": 7}
    options |= {"repetition_penalty": 1.1, "frequency_penalty": 0.2}
    want = load("reference").generate("The old man", **options)
    found = load(backend).generate("The old man", **options)
    assert found.tokens == want.tokens
    assert found.text == want.text


def test_native_greedy_text_differs_only_at_near_ties(backend: str) -> None:
    reference, other = load("reference", "native"), load(backend, "native")
    want = reference.generate("It was a dark night", max_tokens=48, temperature=0).tokens
    found = other.generate("It was a dark night", max_tokens=48, temperature=0).tokens
    for i, (a, b) in enumerate(zip(want, found, strict=True)):
        if a != b:
            prompt = reference.encode("It was a dark night")
            row = reference.logits([*prompt, *want[:i]])[-1]
            assert row[a] - row[b] < NEAR_TIE, f"token {i}: {a} or {b}, {row[a] - row[b]:.3f} apart"
            break


def test_a_stream_whose_cache_another_prompt_took_says_so() -> None:
    llm = load("reference")
    stream = llm.stream("Once upon a time", max_tokens=9, temperature=0)
    next(stream)
    for begin in (lambda: llm.generate("The king", max_tokens=2), lambda: llm.logits([0, 5])):
        begin()
        with pytest.raises(PromptError, match="another prompt was begun"):
            next(stream)
        stream = llm.stream("Once upon a time", max_tokens=9, temperature=0)
        next(stream)
    assert [*stream][-1].generation is not None
    first, second = (llm.stream("Once", max_tokens=1) for _ in range(2))
    assert [[*one][-1].generation for one in (first, second)]


@pytest.mark.parametrize("bias", [float("nan"), 1e300, -1e300])
def test_a_bias_that_float32_has_no_room_for(bias: float) -> None:
    with pytest.raises(PromptError, match="logit_bias"):
        ds4.SamplingParams(logit_bias={5: bias})


def test_a_prompt_that_begins_alike_is_not_run_again(backend: str) -> None:
    llm = load(backend)
    first = llm.generate("Once upon a time there was a king", max_tokens=8, temperature=0)
    again = llm.generate("Once upon a time there was a king", max_tokens=8, temperature=0)
    assert again.tokens == first.tokens
    assert again.usage["cached_tokens"] == first.usage["prompt_tokens"] - 1
    other = llm.generate("Once upon a time there was a queen", max_tokens=8, temperature=0)
    fresh = load(backend).generate(
        "Once upon a time there was a queen", max_tokens=8, temperature=0
    )
    assert 0 < other.usage["cached_tokens"] < other.usage["prompt_tokens"] - 1
    assert other.tokens == fresh.tokens


def heldout(tokens: int) -> list[int]:
    text = (DEMO / "heldout.txt").read_text("utf-8")
    return load("reference").encode(text)[:tokens]


def perplexity(logits: np.ndarray, ids: list[int]) -> float:
    rows = logits[:-1].astype(np.float64)
    chosen = rows[np.arange(len(rows)), ids[1:]]
    peak = rows.max(-1)
    return float(np.exp((np.log(np.exp(rows - peak[:, None]).sum(-1)) + peak - chosen).mean()))


def test_perplexity_equals_that_of_transformers(backend: str) -> None:
    ids = heldout(1024)
    want = perplexity(oracle.logits(oracle.from_checkpoint(DEMO), ids), ids)
    found = perplexity(load(backend).logits(ids), ids)
    assert found == pytest.approx(want, rel=1e-3)
    bigram = json.loads((DEMO / "training.json").read_text())["heldout"]["bigram"]["perplexity"]
    assert found < bigram / 2


def test_native_perplexity_is_close_to_exact() -> None:
    ids = heldout(768)
    exact = perplexity(load("reference").logits(ids), ids)
    native = perplexity(load("reference", "native").logits(ids), ids)
    assert native == pytest.approx(exact, rel=0.02)


def test_the_choice_of_entries_matters() -> None:
    """The indexer was trained: its choice beats taking the earliest entries by far."""
    ids = heldout(768)
    chosen = perplexity(load("reference").logits(ids), ids)
    llm = load("reference")
    be = llm.runner.be

    class First(type(be)):  # type: ignore[misc]
        def index(self, q, weights, pool, step, freqs, ratio, k):  # type: ignore[no-untyped-def]
            entries = np.arange(k)[None]
            return np.where(entries < (step.pos[:, None] + 1) // ratio, entries, -1)

    runner = Runner(First(cache="exact"), llm.config, llm.runner.weights, 1024)
    assert chosen < perplexity(LLM(runner).logits(ids), ids)
