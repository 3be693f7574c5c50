"""Where a recipe fits on a machine, and how fast it should be. Estimates, never measurements.

    decode    seconds a token = dense bytes / (s B) + expert bytes / (s n B) + missed bytes / link,
              these times n x the share of the card with most
    prefill   seconds a token = the largest of operations / (u n C), bytes read / (s B x chunk) and
              bytes not on the GPUs / (1.1 link x chunk), since experts are copied while others are
              multiplied; of several cards the sum with the last. Of experts the bytes are those
              that the chunk's tokens choose, as if routing were uniform: soon all. No chunk takes
              less time than a decoded token

B is the memory bandwidth of a card, n the number of cards, C their arithmetic; s and u are the
shares of B and of C that engines reach (published.py). Expert bytes that the GPUs do not
hold are read over the link, as if routing were uniform; a cache of hot experts does better, which
`skewed` estimates (hits.py). Every card holds all but the routed experts, and a layer waits for the
card that misses most.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..config import Config
from ..errors import BackendError
from ..quant.recipes import RECIPES, Recipe
from .hits import hit_rates, slowest_card
from .machines import GIB, Machine
from .memory import held_beside
from .placement import Budget, Need, divide, need_of_recipe
from .published import efficiency
from .sizes import (
    WeightSizes,
    cache_bytes,
    cache_read_bytes,
    drafter_bytes,
    kept_by,
    prefill_flops,
    weight_sizes,
)

CHUNK = 8192  # tokens of a prompt that go through the layers together
WORKING = 5 * GIB  # activations, libraries, a margin; a further GiB for each further card
CHUNKS = {"mlx": 1024}  # of one sequence, which rings have room for (backends/mlx/ops.py)
OTHER_CHUNK = 256  # of backends that do not say (runner.py)
COPY_ENGINE = 1.1  # of the link's rate: prompts are copied by it, 53.8 GB/s where kernels had 48.7
COMFORTABLE = 20.0  # tokens a second that people read at with ease
NEARLY = 0.9
Guess = Literal["off", "lookup", "mtp", "dspark"]  # nothing, from the text, by such a drafter
PLACES = ("gpu", "cpu", "gpu, raised limit", "gpu + host", "no")  # the best first


@dataclass(frozen=True)
class Fit:
    """One recipe on one machine, at one context."""

    recipe: str
    weights: WeightSizes
    cache: int  # bytes
    where: str  # one of PLACES
    resident: float  # share of the expert bytes that the GPUs hold
    largest_context: int  # 0 if it does not fit
    decode: float | None  # tokens/s
    decode_ceiling: float | None  # the same at the full bandwidth
    prefill: float | None  # tokens/s
    budget: Budget | None = None  # of each card, where experts are in two memories
    skewed: float | None = None  # decode with skewed routing
    drafter: int = 0  # bytes of its weights, on each card

    @property
    def fits(self) -> bool:
        return self.where != "no"


def fit(cfg: Config, machine: Machine, recipe: Recipe, context: int, guess: Guess = "off") -> Fit:
    """Place a recipe on a machine. What guesses bring is not in its speeds, what they take is."""
    sizes, cache = weight_sizes(cfg, recipe), sequence_bytes(cfg, machine, context)
    held = -(-cfg.n_routed_experts // machine.cards)
    need = need_of_recipe(cfg, recipe.name, context, held=held)
    drafter = drafter_bytes(cfg, guess, recipe) if guess in ("mtp", "dspark") else 0
    need = replace(need, drafter=None if guess == "off" else drafter)
    where, resident, budget = _place(machine, sizes, need)
    decode = prefill = ceiling = skewed = None
    if where != "no":
        share = efficiency(machine).bandwidth
        found = resident if budget is None else budget.resident_decoding
        decode = _decode(cfg, machine, sizes, found, context, share)
        ceiling = _decode(cfg, machine, sizes, found, context, 1.0)
        if budget is not None:
            hits = hit_rates(budget)["skewed"]
            skewed = _decode(cfg, machine, sizes, hits, context, share)
        chunk = CHUNK if budget is None else budget.chunk
        step = min(context, chunk)
        prefill = _prefill(cfg, machine, sizes, resident, step, decode)
    largest = _largest_context(machine, sizes, need, where) if where != "no" else 0
    speeds = decode, ceiling, prefill, budget, skewed
    return Fit(recipe.name, sizes, cache, where, resident, largest, *speeds, drafter)


def fits(cfg: Config, machine: Machine, context: int, guess: Guess = "off") -> list[Fit]:
    """Every recipe on a machine, the smallest first."""
    return [fit(cfg, machine, recipe, context, guess) for recipe in RECIPES.values()]


def recommend(found: Sequence[Fit]) -> Fit | None:
    """The most exact recipe that is comfortably fast, or nearly as fast as any that fits."""
    able = [one for one in found if one.fits]
    fastest = max((one.decode or 0.0 for one in able), default=0.0)
    enough = min(COMFORTABLE, NEARLY * fastest)
    return next((one for one in reversed(able) if (one.decode or 0.0) >= enough), None)


def working_bytes(machine: Machine) -> int:
    """Memory kept free for everything that is neither weights nor cache."""
    return WORKING + (machine.cards - 1) * GIB


def sequence_bytes(cfg: Config, machine: Machine, context: int) -> int:
    """Bytes of one sequence's cache, as the backend that runs there keeps it.

    Of cuda without rings' slack and open blocks, which working_bytes has room for.
    """
    backend = machine.backend
    if backend == "cuda":
        return cache_bytes(cfg, context)
    chunk = min(context, CHUNKS.get(backend, OTHER_CHUNK))
    return held_beside(cfg, context, chunk, backend=backend)


# where


def _place(machine: Machine, sizes: WeightSizes, need: Need) -> tuple[str, float, Budget | None]:
    """Where it fits, and the share of expert bytes on the GPUs.

    `need` is a card's, which has its share of the experts, and of host memory for those that the
    cards do not hold; every card has a whole drafter.
    """
    whole = sizes.total + sequence_bytes(need.cfg, machine, need.context)
    whole += working_bytes(machine)
    whole += (need.drafter or 0) * machine.cards
    if whole <= machine.gpu_limit:
        return ("cpu" if machine.kind == "cpu" else "gpu"), 1.0, None
    if whole <= machine.raised_limit:
        return "gpu, raised limit", 1.0, None
    if machine.kind != "gpu":
        return "no", 0.0, None
    try:
        each = int(machine.memory * GIB), int(machine.host_limit / machine.cards)
        budget = divide(need, *each)
    except BackendError:
        return "no", 0.0, None
    return "gpu + host", budget.resident, budget


def _largest_context(machine: Machine, sizes: WeightSizes, need: Need, where: str) -> int:
    """The most tokens, up to the model's own limit, with which this fits as it does now."""
    as_well = PLACES[: PLACES.index(where) + 1]
    low, high = 0, need.cfg.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        if _place(machine, sizes, replace(need, context=middle))[0] in as_well:
            low = middle
        else:
            high = middle - 1
    return low


# how fast


def _decode(
    cfg: Config,
    machine: Machine,
    sizes: WeightSizes,
    resident: float,
    context: int,
    share: float,
) -> float | None:
    if machine.bandwidth is None:
        return None
    rate = machine.bandwidth * 1e9 * share
    dense = sizes.token - sizes.token_experts
    dense += cache_read_bytes(cfg, context, kept_by(machine.backend))
    seconds = (dense + sizes.token_experts / machine.cards) / rate
    if resident < 1:
        missed = sizes.token_experts * (1 - resident) / (machine.link * 1e9)
        seconds += missed * slowest_card(cfg.num_experts_per_tok, 1 - resident, machine.cards)
    return 1 / seconds


def _prefill(
    cfg: Config,
    machine: Machine,
    sizes: WeightSizes,
    resident: float,
    tokens: int,
    decode: float | None,
) -> float | None:
    if machine.tflops is None:
        return None
    rate = machine.tflops * 1e12 * efficiency(machine).compute * machine.cards
    chosen = sizes.experts * touched(cfg, tokens)
    seconds = prefill_flops(cfg, tokens) / rate
    if machine.bandwidth is not None:
        reads = sizes.token - sizes.token_experts + chosen / machine.cards
        share = machine.bandwidth * 1e9 * efficiency(machine).bandwidth
        seconds = max(seconds, reads / (share * tokens))
    if resident < 1:
        copying = chosen * (1 - resident) / (COPY_ENGINE * machine.link * 1e9 * tokens)
        # Of several cards three measurements are within 2 % of the sum. Since then copies run
        # ahead on every card (placement/stream.py), and it may be less.
        seconds = max(seconds, copying) if machine.cards == 1 else seconds + copying
    if decode is not None:
        seconds = max(seconds, 1 / (decode * tokens))
    return 1 / seconds


def touched(cfg: Config, tokens: int) -> float:
    """Share of a layer's experts that some of so many tokens choose."""
    return 1 - (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** tokens
