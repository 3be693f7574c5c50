"""What a token costs: the machine and its electricity, told apart.

No value is left in the machine at the end, nothing is paid for upkeep, and a fraction `duty` of all
hours it works at the measured rate; for the rest it stands idle.
"""

from dataclasses import dataclass
from math import inf
from typing import Any

from ..errors import BenchError

_HOURS = 8760  # a year


@dataclass(frozen=True)
class Terms:
    """`price` in dollars, None if unknown; `tariff` in dollars a kWh; `duty` from 0 to 1."""

    price: float | None = None
    duty: float = 0.5
    tariff: float = 0.20
    years: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.duty <= 1:
            raise BenchError(f"duty must be above 0 and at most 1, not {self.duty}")
        if not (0 < self.years < inf and 0 <= self.tariff < inf and 0 <= (self.price or 0) < inf):
            raise BenchError("years must be above 0; tariff and price not below")


@dataclass(frozen=True)
class Cost:
    """Dollars a million output tokens, and output tokens a dollar; None where a part is unknown."""

    capex: float | None
    electricity: float | None

    @property
    def total(self) -> float | None:
        if self.capex is None or self.electricity is None:
            return None
        return self.capex + self.electricity

    @property
    def tokens_per_dollar(self) -> float | None:
        return 1e6 / self.total if self.total else None

    def entry(self) -> dict[str, Any]:
        """For a results file."""
        return {
            "capex_usd_per_mtok": self.capex,
            "electricity_usd_per_mtok": self.electricity,
            "usd_per_mtok": self.total,
            "tokens_per_usd": self.tokens_per_dollar,
        }


def cost(tok_s: float, load_w: float | None, idle_w: float | None, terms: Terms) -> Cost:
    """Of output at `tok_s`. Without `idle_w` the idle hours count nothing; without `load_w` the
    electricity is unknown."""
    if tok_s <= 0:
        return Cost(None, None)
    millions = tok_s * terms.duty * _HOURS * 3600 * terms.years / 1e6
    capex = None if terms.price is None else terms.price / millions
    if load_w is None:
        return Cost(capex, None)
    watts = load_w * terms.duty + (idle_w or 0.0) * (1 - terms.duty)
    return Cost(capex, terms.tariff * watts / 1e3 * _HOURS * terms.years / millions)


def even_tariff(
    a: tuple[float, float, float], b: tuple[float, float, float], duty: float, years: float = 5.0
) -> float | None:
    """Dollars a kWh at which two machines' tokens cost the same; None if one is cheaper at any.

    Each is (tok/s, watts under load, price); idle hours take nothing.
    """
    costs = []
    for tok_s, watts, price in (a, b):
        made = cost(tok_s, watts, 0.0, Terms(price, duty, 1.0, years))
        assert made.capex is not None
        assert made.electricity is not None
        costs.append((made.capex, made.electricity))
    (capex_a, power_a), (capex_b, power_b) = costs
    if power_a == power_b:
        return None
    tariff = (capex_a - capex_b) / (power_b - power_a)
    return tariff if tariff > 0 else None
