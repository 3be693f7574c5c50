"""The article's comparison of a 128 GB Mac and a rig of two RTX 5090, worked out from its inputs.

It names a speed, a power and a price for each, and concludes in tokens a watt and tokens a dollar
over five years. The first follows from the inputs. The second needs two more: how much of the time
a machine works, and what a kWh costs; which machine wins depends on them.
"""

from .cost import Terms, cost, even_tariff
from .tables import Table, dollars, number

MAC = ("128 GB Mac", 30.0, 105.0, 4700.0)  # tok/s, watts, dollars
RIG = ("2 x RTX 5090", 75.0, 950.0, 6500.0)
YEARS = 5.0
_DUTIES = 0.05, 0.25, 0.5, 1.0
_TARIFFS = 0.0, 0.10, 0.20, 0.40


def tables() -> list[Table]:
    """What follows from the inputs, and what else tokens a dollar depends on."""
    return [_given(), _per_dollar(), _even()]


def _given() -> Table:
    table = Table(
        "The article's inputs, and what follows from them",
        ["machine", "tok/s", "W", "price", "tokens/J = tok/s/W", "tok/s per $1,000"],
    )
    for name, tok_s, watts, price in (MAC, RIG):
        cells = [number(tok_s), number(watts), dollars(price), number(tok_s / watts)]
        table.rows.append([name, *cells, number(tok_s / price * 1e3)])
    per_watt = (MAC[1] / MAC[2]) / (RIG[1] / RIG[2])
    per_price = (RIG[1] / RIG[3]) / (MAC[1] / MAC[3])
    table.notes = [
        f"per watt the Mac makes {per_watt:.2f} times as many tokens: this follows",
        f"per dollar of its price the rig makes {per_price:.2f} times as many",
        "the speeds are inputs here, not ours: ds4 plan --article has what each can be expected "
        "to do; watts are mid-range figures of the article, at an unnamed scope",
    ]
    return table


def _per_dollar() -> Table:
    table = Table(
        f"Million tokens a dollar over {YEARS:g} years, Mac / rig",
        ["at work", *(f"${tariff:.2f} a kWh" for tariff in _TARIFFS)],
    )
    for duty in _DUTIES:
        cells = []
        for tariff in _TARIFFS:
            mac, rig = (_tokens_per_dollar(machine, duty, tariff) / 1e6 for machine in (MAC, RIG))
            cells.append(f"{mac:.3f} / {rig:.3f} {'Mac' if mac > rig else 'rig'}")
        table.rows.append([f"{duty:.0%}", *cells])
    table.notes = [
        "without electricity the rig wins at any duty: the price alone decides, by "
        f"{_tokens_per_dollar(RIG, 1, 0) / _tokens_per_dollar(MAC, 1, 0):.2f} times",
        "so one figure of tokens a dollar does not follow from speed, power and price: it takes "
        "a duty and a tariff that the article does not give, and they decide who wins",
        "idle hours are taken to draw nothing, as the article has no idle power; a rig that idles "
        "at 100 W or more shifts every cell below 100 % towards the Mac",
    ]
    return table


def _tokens_per_dollar(
    machine: tuple[str, float, float, float], duty: float, tariff: float
) -> float:
    _, tok_s, watts, price = machine
    made = cost(tok_s, watts, 0.0, Terms(price, duty, tariff, YEARS))
    assert made.tokens_per_dollar is not None
    return made.tokens_per_dollar


def _even() -> Table:
    table = Table("The tariff at which both cost the same", ["at work", "$ a kWh"])
    for duty in _DUTIES:
        even = even_tariff(MAC[1:], RIG[1:], duty, YEARS)
        table.rows.append([f"{duty:.0%}", ABOVE if even is None else dollars(even)])
    table.notes = ["above it the Mac is cheaper a token, below it the rig"]
    return table


ABOVE = "the rig at any"
