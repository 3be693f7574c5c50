"""What a step's rows cost where experts lie in host memory: most of what makes guesses dear there.

Every row chooses experts of its own, and those that are not on the GPU must be fetched. Of n rows
that choose K of E experts a layer, if by chance, E (1 - (1 - K/E)^n) differ.
"""

import time
from typing import Any

from ..config import Config

LOOK_EVERY = 2.0  # seconds between two looks at the counts, for which the device has to wait


class Misses:
    """Rows of a step -> seconds that fetching takes, by misses and the speed of the link so far.

    placement  a backend's: its `report()` and its budget
    """

    def __init__(self, placement: Any, cfg: Config) -> None:
        self._placement, self._cfg = placement, cfg
        self._looked = -LOOK_EVERY
        self._each = 0.0  # seconds for one expert more in every layer

    def __call__(self, rows: int) -> float:
        if (now := time.monotonic()) >= self._looked + LOOK_EVERY:
            self._looked, self._each = now, self._look()
        experts = self._cfg.n_routed_experts
        others = 1 - self._cfg.num_experts_per_tok / experts
        return self._each * experts * (1 - others**rows)

    def _look(self) -> float:
        report, size = self._placement.report(), self._placement.budget.need.expert
        if not report.host_rate:
            return 0.0
        missed = self._cfg.num_hidden_layers * (1 - report.hit_rate)
        return float(missed * size / report.host_rate)
