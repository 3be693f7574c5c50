"""The checkpoints that a ladder compares.

Three questions: what each recipe costs, what the way of finding codes is worth, and what it costs
to drop experts, by which rule.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..quant.calibration import Calibration
from ..quant.convert import METHODS, Method
from ..quant.pruning import reap
from ..quant.quantize import Keep
from ..quant.recipes import RECIPES

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

    def keep(self, calibration: Calibration) -> Keep | None:
        """Which experts quantize_checkpoint is to keep."""
        if self.experts is None:
            return None
        if self.rule == "REAP":
            return self.experts, reap(calibration)
        if self.rule == "frequency":
            return self.experts, calibration.counts
        seed = int(self.rule.removeprefix("random "))
        rng = np.random.default_rng(seed)
        return self.experts, {
            layer: rng.random(len(count)) for layer, count in calibration.counts.items()
        }


def recipes() -> list[Variant]:
    """From the smallest recipe to the lossless one."""
    return [Variant(name) for name in RECIPES]


def methods() -> list[Variant]:
    """Each way to find codes, for the recipes whose experts have fewer than four bits."""
    small = [name for name, recipe in RECIPES.items() if recipe.gate_up.bits < 4]
    ways: list[Any] = [("rtn", False), ("ls", False), ("ls", True), ("gptq", True)]
    return [Variant(name, *way) for name in small for way in ways if way[0] in METHODS]


def prunings(experts: int) -> list[Variant]:
    """A quarter of the experts dropped by each rule, the others as shipped."""
    left = experts - experts // 4
    rules = ["REAP", "frequency", *(f"random {seed}" for seed in range(SEEDS))]
    return [Variant(LOSSLESS, "rtn", False, left, rule) for rule in rules]
