"""The checkpoints that a ladder compares.

Three questions: what each recipe costs, what the way of finding codes is worth, and what it costs
to drop experts, by which rule.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quant.calibration import Calibration
from ..quant.convert import Method
from ..quant.pruning import reap
from ..quant.recipes import RECIPES

Array = NDArray[Any]

LOSSLESS = "q8_0"
SEEDS = 5  # of the random choice of experts


@dataclass(frozen=True)
class Variant:
    """One checkpoint to be made."""

    recipe: str
    method: Method = "ls"
    calibrated: bool = True  # whether codes are found with what the calibration saw
    experts: int | None = None  # how many are left of each layer; None for all
    rule: str = ""  # which experts are left: "REAP", "frequency" or "random 0", "random 1", ...

    @property
    def name(self) -> str:
        """A folder's name."""
        parts = [self.recipe, self.method, "calibrated" if self.calibrated else ""]
        if self.experts is not None:
            parts += [f"{self.experts}-experts", self.rule.lower().replace(" ", "-")]
        return "-".join(part for part in parts if part)

    def saliency(self, calibration: Calibration) -> dict[int, Array] | None:
        """Layer -> (E,): the experts of the largest stay."""
        if self.experts is None:
            return None
        if self.rule == "REAP":
            return reap(calibration)
        if self.rule == "frequency":
            return calibration.counts
        rng = np.random.default_rng(int(self.rule.removeprefix("random ")))
        return {layer: rng.random(len(count)) for layer, count in calibration.counts.items()}


def recipes() -> list[Variant]:
    """From the smallest recipe to the lossless one."""
    return [Variant(name) for name in RECIPES]


def methods() -> list[Variant]:
    """Each way to find codes, for the recipes whose experts have fewer than four bits."""
    small = [name for name, recipe in RECIPES.items() if recipe.gate_up.bits < 4]
    ways: list[tuple[Method, bool]] = [("rtn", False), ("ls", False), ("ls", True), ("gptq", True)]
    return [Variant(name, *way) for name in small for way in ways]


def prunings(experts: int) -> list[Variant]:
    """A quarter of the experts dropped by each rule, the others as shipped."""
    left = experts - experts // 4
    rules = ["REAP", "frequency", *(f"random {seed}" for seed in range(SEEDS))]
    return [Variant(LOSSLESS, "rtn", False, left, rule) for rule in rules]
