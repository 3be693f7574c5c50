"""Which share of the experts a GPU holds when not all fit: sizes, before anything is loaded.

GPU memory goes first to what every token reads (attention, shared experts, routers, head; of the
embedding a token reads one row, so it stays in host memory if kernels can read it there), then to
the caches, to the largest step's working memory and to a ring that prompts stream experts through;
what is left is slots for experts. Host memory holds the others, and as many copies of those in
slots as it has room for: an expert with a copy can give its slot away at no cost.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from ..backend import CacheMode
from ..config import Config
from ..errors import BackendError, ConfigError
from ..quant.recipes import RECIPES
from ..weights.export import storage_format
from ..weights.names import expected
from .memory import DECODED, held_beside, recorded, recorded_tokens, working
from .sizes import BY_HEADS, head_bytes, head_parts, weight_sizes

RESERVE = 1500 << 20  # context, libraries and kernels (1 GB), and what the allocator cannot use
PAGES = 550 << 20  # of that it can, where it takes memory in pages: where experts are divided
HOLES = 1 / 8  # of a step's arrays, more: between them (0.44 GB of 3.5 as PyTorch takes pages)
SPARE = 100 << 20  # more while decoding, measured: not lent
BETWEEN_RANKS = 1000 << 20  # more of it where ranks sum through NCCL
CHUNKS = (16_384, 8192, 4096, 2048, 1024, 512)  # tokens of a prompt that a step takes
CHUNK_SHARE = 0.22  # of GPU memory that a ring and working memory for a chunk may take
LINK, ENOUGH = 50e9, 8000  # bytes from host memory, and tokens of a prompt, a second
SLOTS_SHARE = 0.25  # that the rings of all slots may take with it; beyond it chunks shrink
SECTIONS = 3  # of the ring: one is read while others are filled
GROUP_SHARE = 8  # a section holds this part of a layer's experts
MATRICES = ("w1", "w3", "w2")
_ALIGN = 16


@dataclass(frozen=True)
class Need:
    """What a model asks of one process and its GPU, in bytes."""

    cfg: Config
    others: int  # weights that are no routed experts
    matrices: tuple[int, int, int]  # w1, w3 and w2 of one expert
    context: int
    slots: int
    held: int  # experts of each layer that are this process's: all, or its rank's share
    table: int = 0  # of `others`, the embedding, if host memory can have it
    cache: CacheMode = "native"
    drafter: int | None = None  # weights of one, 0 of look-up; None: nothing is guessed
    backend: str = "cuda"

    @property
    def expert(self) -> int:
        return sum(self.matrices)

    @property
    def experts(self) -> int:
        return self.expert * self.held * self.cfg.num_hidden_layers

    @property
    def dense(self) -> int:
        """All weights but the experts."""
        return self.others + (self.drafter or 0)

    @property
    def reserve(self) -> int:
        """For what is neither weights nor ours."""
        return RESERVE + (BETWEEN_RANKS if self.held < self.cfg.n_routed_experts else 0)

    @property
    def parts(self) -> int:
        """Ranks that attention is split over."""
        return head_parts(self.cfg, round(self.cfg.n_routed_experts / self.held))

    def fixed(self, chunk: int) -> int:
        """GPU memory that there is no choice of, if experts are divided, in steps of `chunk`.

        Of these steps only those of decoding are recorded.
        """
        weights = self.dense - self.table
        return self.reserve - PAGES + weights + self.beside(chunk) + self.recorded(DECODED[-1])

    def beside(self, chunk: int) -> int:
        """Caches, and working memory, for steps of up to `chunk` tokens a sequence."""
        return self.slots * self.held_beside(chunk) + self.working(chunk)

    def held_beside(self, chunk: int) -> int:
        """Caches of one slot."""
        return held_beside(self.cfg, self.context, chunk, self.cache, self.backend)

    def working(self, chunk: int) -> int:
        """Memory that a step of `chunk` tokens has for itself."""
        return int((1 + HOLES) * working(self.cfg, self.context, chunk, self.parts))

    def recorded(self, tokens: int) -> int:
        """Memory that CUDA graphs of steps of up to `tokens` keep."""
        guess = self.drafter is not None
        return recorded(self.cfg, self.context, tokens, self.slots, self.parts, guess)


@dataclass(frozen=True)
class Budget:
    """Where the experts of each layer go."""

    need: Need
    slots: tuple[int, ...]  # of each layer, on the GPU
    homes: int  # of each layer, in host memory
    chunk: int  # tokens of a prompt that a step takes
    group: int  # experts of a section of the ring
    gpu_bytes: int  # what it was made for
    lent: int = 0  # more slots of each layer, where prompts have their working memory

    @property
    def resident(self) -> float:
        """Share of the experts that are on the GPU."""
        return sum(self.slots) / (len(self.slots) * self.need.held)

    @property
    def resident_decoding(self) -> float:
        """The same while no prompt is run."""
        return self.resident + self.lent / self.need.held

    @property
    def lent_bytes(self) -> int:
        return self.lent * len(self.slots) * self.need.expert

    @property
    def slot_bytes(self) -> int:
        return sum(self.slots) * self.need.expert

    @property
    def host_bytes(self) -> int:
        return self.homes * len(self.slots) * self.need.expert

    @property
    def ring_bytes(self) -> int:
        return SECTIONS * self.group * self.need.expert


def need_of(
    cfg: Config, source: Any, context: int, slots: int = 1, held: int | None = None
) -> Need:
    """From a Checkpoint or SyntheticCheckpoint, by the sizes of its tensors; experts are alike.

    `held` of each layer's experts are one rank's, which also has its share of the heads.
    """
    others = fp8 = table = 0
    held = held or cfg.n_routed_experts
    parts = head_parts(cfg, round(cfg.n_routed_experts / held))
    sample: dict[str, int] = {}
    for name, shape in expected(cfg).items():
        matrix = name.split(".")[-2] if ".ffn.experts." in name else ""
        if matrix in sample:
            continue
        if hasattr(source, "layout"):
            layout = source.layout(name, shape)
            nbytes, kind = layout.nbytes, layout.format
        else:
            nbytes = source.nbytes(name)
            kind = "made" if source.recipe else storage_format(name, cfg.expert_dtype)
        if matrix:
            sample[matrix] = nbytes
            continue
        if name == "embed.weight" and nbytes >= 2 * shape[0] * shape[1]:  # plain values
            table = nbytes
        here = parts if name.endswith(BY_HEADS) else 1
        others += nbytes // here
        if kind == "fp8":  # its scales are kept one for 32 values of a row
            fp8 += shape[0] * shape[1] // 32 // here
    w1, w3, w2 = (_row(sample[matrix]) for matrix in MATRICES)
    return Need(cfg, others + fp8, (w1, w3, w2), context, slots, held, table)


def need_of_recipe(
    cfg: Config, recipe: str, context: int, slots: int = 1, held: int | None = None
) -> Need:
    """The same of a recipe, before there are files."""
    sizes = weight_sizes(cfg, RECIPES[recipe])
    count = cfg.n_routed_experts * cfg.num_hidden_layers
    gate_up, down = (_row(sizes.by_class[kind] // count) for kind in ("gate_up", "down"))
    matrices, held = (gate_up // 2, gate_up // 2, down), held or cfg.n_routed_experts
    heads = head_bytes(cfg, RECIPES[recipe])
    parts = head_parts(cfg, round(cfg.n_routed_experts / held))
    others = sizes.others - heads + heads // parts
    table = sizes.by_class["embed"]
    if table < 2 * cfg.vocab_size * cfg.hidden_size:
        table = 0
    return Need(cfg, others, matrices, context, slots, held, table)


def _row(nbytes: int) -> int:
    """One matrix as the kernels take it (backends/cuda/qmatrix.py), at most."""
    return -(-nbytes // _ALIGN) * _ALIGN + 3 * _ALIGN


def fits_whole(need: Need, gpu_bytes: int, chunk: int) -> bool:
    """Whether all experts can be on the GPU, with steps of `chunk` tokens."""
    beside = need.beside(chunk) + need.recorded(recorded_tokens(chunk)) + need.reserve
    return need.dense + need.experts + beside <= gpu_bytes


def divide(need: Need, gpu_bytes: int, host_bytes: int) -> Budget:
    """Places for all experts. Raises BackendError, with what would fit, if there are too few."""
    cfg = need.cfg
    chunk = _chunk(need, gpu_bytes)
    group = -(-need.held // GROUP_SHARE)
    fixed = need.fixed(chunk) + SECTIONS * group * need.expert
    layers, experts = cfg.num_hidden_layers, need.held
    count = min((gpu_bytes - fixed) // need.expert, layers * experts)
    if count < layers * min(cfg.num_experts_per_tok, experts):
        least = fixed + layers * cfg.num_experts_per_tok * need.expert
        raise BackendError(
            f"{_gb(gpu_bytes)} of GPU memory are too few: weights that every token reads, caches "
            f"for {need.slots} x {need.context:,} tokens and {cfg.num_experts_per_tok} experts a "
            f"layer need {_gb(least)}; "
            "shorten --context, or take a smaller recipe (ds4 plan)"
        )
    slots = tuple(count // layers + (i < count % layers) for i in range(layers))
    homes = min(experts, max(0, host_bytes - need.table) // (layers * need.expert))
    if slots[-1] + homes < experts:
        missing = (experts - slots[-1] - homes) * layers * need.expert
        raise BackendError(
            f"{_gb(host_bytes)} of free host memory are {_gb(missing)} too few for the experts "
            f"that {_gb(gpu_bytes)} of GPU memory do not hold: "
            + _advice(need, gpu_bytes, host_bytes)
        )
    budget = Budget(need, slots, int(homes), chunk, group, gpu_bytes)
    return replace(budget, lent=_lent(budget))


def _lent(budget: Budget) -> int:
    """Slots of each layer that fit in what long steps need and short ones do not."""
    need, layers = budget.need, len(budget.slots)
    idle = need.working(budget.chunk) - need.working(DECODED[-1])
    room = (idle + budget.ring_bytes - SPARE) // (layers * need.expert)
    return max(0, min(room, need.held - max(budget.slots), budget.homes))


def long_chunk(need: Need, gpu_bytes: int) -> int:
    """The shortest step by which prompts are fast enough, or the longest that there is room for.

    A prompt reads every expert that is not on the GPU once a step: the fewer steps, the faster.
    Room is for the working memory and the ring of one slot.
    """
    most, one, chosen = CHUNK_SHARE * gpu_bytes, replace(need, slots=1), 0
    for chunk in (min(c, need.context) for c in reversed(CHUNKS) if c < 2 * need.context):
        if chosen and one.beside(chunk) - one.beside(0) > most:
            break
        chosen = chunk
        away = need.experts - (gpu_bytes - one.fixed(chunk))
        if chunk / max(away, 1) * LINK >= ENOUGH:
            break
    return chosen or min(CHUNKS[-1], need.context)


def _chunk(need: Need, gpu_bytes: int) -> int:
    """The same for all slots together, if these take too much of the GPU."""
    longest = long_chunk(need, gpu_bytes)
    most, fewer = SLOTS_SHARE * gpu_bytes, [c for c in (longest, *CHUNKS) if c <= longest]
    return next((c for c in fewer if need.beside(c) - need.beside(0) <= most), fewer[-1])


def _advice(need: Need, gpu_bytes: int, host_bytes: int) -> str:
    """The most exact recipe that would fit."""
    for name in reversed(RECIPES):
        other = need_of_recipe(need.cfg, name, need.context, need.slots, need.held)
        other = replace(other, cache=need.cache, drafter=need.drafter)
        ring = SECTIONS * -(-need.held // GROUP_SHARE) * other.expert
        beside = other.fixed(_chunk(other, gpu_bytes)) + ring
        if other.experts < need.experts and other.experts <= gpu_bytes - beside + host_bytes:
            return f"the recipe {name} would fit (ds4 quantize --recipe {name})"
    return "no recipe would fit; a pruned model (ds4 plan --experts 160) is smaller"


def memory_bytes(text: "str | int | None") -> int | None:
    """ "32GB" -> 32e9, "30GiB" -> 30 * 2^30; a number is bytes. Raises ConfigError."""
    if text is None or isinstance(text, int):
        return text
    found = re.fullmatch(r"([0-9.]+)\s*(GB|GiB|MB|MiB)?", text.strip(), re.IGNORECASE)
    units = {"gb": 10**9, "gib": 2**30, "mb": 10**6, "mib": 2**20, None: 1}
    try:
        assert found is not None
        return int(float(found[1]) * units[found[2].lower() if found[2] else None])
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"gpu_memory: {text!r} is no size: give one such as 32GB") from error


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.1f} GB"
