"""What a token finds on the GPU where experts are in two memories, once the cache has settled."""

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from .placement import Budget

FADE = 0.998  # of what the cache's rule counts, a token (backends/cuda/placement/policy.py)
REPETITION, EXPONENT = 0.3, -0.8  # of the skew that speeds are estimated for

Floats = NDArray[np.float64]


def hit_rates(budget: Budget) -> Mapping[str, float]:
    """The share of a token's experts that are on the GPU.

    "uniform" routing; "skewed": popularity as rank^-0.8, and 30 % of tokens take the experts of the
    one before. The cache keeps those that it has counted most: nearly the most popular, but what it
    counts is of some hundred tokens, and chance.
    """
    cfg, experts = budget.need.cfg, budget.need.held
    picks = cfg.num_experts_per_tok * experts / cfg.n_routed_experts
    slots = min(budget.slots) + budget.lent
    chosen = _chosen(
        np.arange(1, experts + 1, dtype=np.float64) ** EXPONENT, min(picks, experts - 1)
    )
    count = chosen / (1 - FADE)  # of an expert: its mean; repeated tokens make it less certain
    spread = chosen * (1 - chosen) / (1 - FADE**2) * (1 + REPETITION) / (1 - REPETITION)
    normal = np.vectorize(NormalDist().cdf)

    def kept(least: float) -> Floats:
        """How likely an expert is kept, if that takes such a count."""
        there: Floats = normal((count - least) / np.sqrt(spread))
        return there

    least = _root(lambda x: slots - float(kept(x).sum()), -count.max(), 2 * count.max())
    share = float((chosen * kept(least)).sum() / chosen.sum()) if slots < experts else 1.0
    return {"uniform": budget.resident_decoding, "skewed": REPETITION + (1 - REPETITION) * share}


def _chosen(popularity: Floats, picks: float) -> Floats:
    """How likely each expert is one of a token's `picks` different ones."""
    shares = popularity / popularity.sum()
    draws = _root(lambda n: float((1 - np.exp(-n * shares)).sum()) - picks, 0.0, 1e6)
    found: Floats = 1 - np.exp(-draws * shares)
    return found


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def slowest_card(picks: int, missing: float, cards: int) -> float:
    """How many times its even share of a layer's misses the card has that has most of them.

    Each of a token's `picks` is missing with such a chance, and any card's: a layer ends when the
    card has copied that copies most.
    """
    if cards == 1 or missing <= 0:
        return 1.0
    terms = [1 / math.factorial(n) for n in range(picks + 1)]
    mean = 0.0
    for most in range(picks):  # the mean is the sum of the chances that a card has more
        at_most = np.polynomial.Polynomial([(1 - missing) ** n * t for n, t in enumerate(terms)])
        each = [(missing / cards) ** n * t for n, t in enumerate(terms[: most + 1])]
        at_most = at_most * np.polynomial.Polynomial(each) ** cards
        mean += 1 - at_most.coef[picks] * math.factorial(picks) if len(at_most.coef) > picks else 1
    return mean * cards / (picks * missing)
