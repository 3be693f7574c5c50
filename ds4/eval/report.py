"""A ladder's rows for people, for programs and for docs/quality.md, and what they show."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ladder import Ladder, Row
from .variants import LOSSLESS, Variant, methods, prunings, recipes

Array = NDArray[Any]

HEADINGS = ("recipe", "how", "size", "bits/weight", "KL", "±", "top-1", "perplexity")


@dataclass(frozen=True)
class Finding:
    """A claim on the rows, whether it holds, and the figures."""

    claim: str
    holds: bool
    figures: str

    def __str__(self) -> str:
        return f"{self.claim}: {'yes' if self.holds else 'NO'}. {self.figures}"


@dataclass(frozen=True)
class Tables:
    """The three groups of rows."""

    top: Row
    recipes: list[Row]
    methods: list[Row]
    prunings: list[Row]

    @classmethod
    def measured(cls, ladder: Ladder) -> "Tables":
        return cls(
            ladder.top,
            ladder.measure(recipes()),
            ladder.measure(methods()),
            ladder.measure(prunings(ladder.cfg.n_routed_experts)),
        )

    @property
    def groups(self) -> dict[str, list[Row]]:
        return {"recipes": self.recipes, "methods": self.methods, "pruning": self.prunings}

    def findings(self) -> list[Finding]:
        """What the rows show, by the claims that the project makes."""
        return [
            _falling(self.recipes),
            _rising(self.recipes),
            _lossless(self.recipes[-1]),
            *_better_codes(self.methods),
            _better_choice(self.prunings),
        ]


def _kl(row: Row) -> float:
    return row.score.mean_kl or 0.0


def _kls(row: Row) -> Array:
    assert row.score.kl is not None  # only the source has none
    return row.score.kl


def _label(row: Row) -> str:
    return "source" if row.variant is None else row.variant.recipe


def _falling(rows: Sequence[Row]) -> Finding:
    """Steps in standard errors of the difference on the same tokens."""
    steps = []
    for lower, higher in pairwise(rows):
        apart = _kls(lower) - _kls(higher)
        error = max(float(apart.std()) / len(apart) ** 0.5, 1e-12)
        steps.append((f"{_label(lower)} > {_label(higher)}", float(apart.mean()), error))
    figures = "; ".join(f"{name} by {mean:.2g} ± {error:.1g}" for name, mean, error in steps)
    holds = all(mean > 0 for _, mean, _ in steps)
    return Finding("KL falls from each recipe to the next", holds, figures)


def _rising(rows: Sequence[Row]) -> Finding:
    shares = [row.score.top1 or 0.0 for row in rows]
    holds = all(a < b for a, b in pairwise(shares))
    figures = " < ".join(f"{share:.2%}" for share in shares)
    return Finding("Top-1 agreement rises from each recipe to the next", holds, figures)


def _lossless(row: Row) -> Finding:
    top1 = row.score.top1 or 0.0
    return Finding(
        f"{LOSSLESS} predicts exactly what the source does",
        _kl(row) == 0 and top1 == 1,
        f"KL {_kl(row):g}, top-1 {top1:.2%}",
    )


def _better_codes(rows: Sequence[Row]) -> list[Finding]:
    by = {row.variant: _kl(row) for row in rows}
    names = list(dict.fromkeys(_label(row) for row in rows))
    weighed = {name: by[Variant(name)] / by[Variant(name, "rtn", False)] for name in names}
    solved = {name: by[Variant(name, "gptq")] / by[Variant(name)] for name in names}
    return [
        Finding(
            "Least squares with calibration has at most 0.6 times the KL of rounding to nearest",
            all(ratio <= 0.6 for ratio in weighed.values()),
            _ratios(weighed),
        ),
        Finding(
            "GPTQ has no more KL than least squares with calibration",
            all(ratio <= 1 for ratio in solved.values()),
            _ratios(solved),
        ),
    ]


def _ratios(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {ratio:.2f} times" for name, ratio in found.items())


def _better_choice(rows: Sequence[Row]) -> Finding:
    reap, frequency, *drawn = (_kl(row) for row in rows)
    chance = float(np.mean(drawn))
    return Finding(
        "Experts chosen by REAP cost less than by frequency or at random",
        reap < min(frequency, chance),
        f"KL {reap:.4f}; by frequency {frequency:.4f}; at random {chance:.4f} "
        f"(mean of {len(drawn)}, {min(drawn):.4f} to {max(drawn):.4f}, of which "
        f"{sum(kl < reap for kl in drawn)} below REAP)",
    )


# showing


def cells(row: Row) -> list[str]:
    """A row under HEADINGS."""
    score, variant = row.score, row.variant
    kl = [] if score.mean_kl is None or score.kl_error is None else [score.mean_kl, score.kl_error]
    return [
        "source" if variant is None else variant.recipe,
        "" if variant is None else _way(variant),
        size(row.nbytes),
        f"{row.bits_per_weight:.2f}",
        *([f"{x:.5f}" for x in kl] or ["", ""]),
        "" if score.top1 is None else f"{score.top1:.2%}",
        f"{score.perplexity:.3f}",
    ]


def _way(variant: Variant) -> str:
    if variant.experts is not None:
        return f"{variant.experts} experts, {variant.rule}"
    if variant.recipe == LOSSLESS:
        return "as shipped"
    return variant.method + (" + calibration" if variant.calibrated else "")


def size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"


def entry(row: Row) -> dict[str, Any]:
    """A row for --json."""
    score, variant = row.score, row.variant
    about: dict[str, Any] = {"recipe": None}
    if variant is not None:
        about = {
            "recipe": variant.recipe,
            "method": variant.method,
            "calibrated": variant.calibrated,
            "experts": variant.experts,
            "experts_chosen_by": variant.rule or None,
        }
    return about | {
        "bytes": row.nbytes,
        "parameters": row.parameters,
        "bits_per_weight": row.bits_per_weight,
        "kl": score.mean_kl,
        "kl_error": score.kl_error,
        "top1": score.top1,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }
