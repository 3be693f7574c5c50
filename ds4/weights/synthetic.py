"""A checkpoint of random values for any config: to check, and to measure without a download.

Nothing is stored. A weight is described (synthetic_tensor.py), and a backend may make its bytes on
the device: the real model takes seconds. Values keep activations finite through any depth.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from ..config import Config
from ..errors import ConfigError
from ..quant.recipes import Recipe
from .export import storage_format
from .names import Drafter, Shape, expected, expected_drafter
from .synthetic_tensor import Description, SyntheticTensor
from .tensor import Array, HostTensor

Routing = Literal["uniform", "skewed"]
UNIQUE_SPREAD = 0.02  # of router biases, where scores differ by 0.3
TOKEN_CLASSES = 4096  # different rows of a routing table


@dataclass(frozen=True)
class Popularity:
    """How often experts are chosen: uniform, or as rank^-0.8 in an order of its own a layer."""

    routing: Routing
    experts: int
    chosen: int

    def shares(self, rng: np.random.Generator) -> Array:
        """(experts,): how likely each is among the chosen of a token; at most 0.95."""
        if self.routing == "uniform":
            return np.full(self.experts, min(self.chosen / self.experts, 0.95))
        weights = rng.permutation(np.arange(1, self.experts + 1) ** -0.8)
        return np.minimum(weights / weights.sum() * self.chosen, 0.95)

    def bias(self, rng: np.random.Generator) -> Array:
        """(experts,) float32 for the router: a score above minus this is chosen.

        Scores are sqrt(softplus(z)), z about normal, so the bias is minus the quantile that is
        exceeded as often as the expert is to be chosen.
        """
        z = np.array([NormalDist().inv_cdf(1 - share) for share in self.shares(rng)])
        noise = UNIQUE_SPREAD * rng.standard_normal(self.experts)
        return (noise - np.sqrt(np.log1p(np.exp(z)))).astype(np.float32)

    def table(self, rng: np.random.Generator, tokens: int) -> Array:
        """(tokens, chosen) int64: different experts for a token, likelier ones more often."""
        classes = min(tokens, TOKEN_CLASSES)
        luck = np.log(self.shares(rng)) + rng.gumbel(size=(classes, self.experts))
        rows = np.argsort(-luck, -1)[:, : self.chosen]
        return rows[rng.permutation(tokens) % classes]


class SyntheticCheckpoint:
    """Reads like `Checkpoint`: the same tensor has the same values each time it is read.

    recipe         formats of the matrices; None: those of the official checkpoint
    routing        which experts are chosen: see Popularity
    unique_layers  so many first layers have weights of their own; each later one takes those of
                   one of the same kind, in turn, and a loader keeps equal tensors once; None: all
    drafter        a drafter as well, whose guesses are as random as the rest
    """

    def __init__(
        self,
        cfg: Config,
        seed: int = 0,
        recipe: Recipe | None = None,
        routing: Routing = "uniform",
        unique_layers: int | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.cfg, self.seed = cfg, seed
        self.recipe = None if recipe is None else recipe.for_experts(cfg.expert_dtype)
        self.popularity = Popularity(routing, cfg.n_routed_experts, cfg.num_experts_per_tok)
        self.same_as = shared_layers(cfg, unique_layers)
        self.shapes = expected(cfg)
        self.drafter = drafter
        self._of_drafter = expected_drafter(cfg, drafter) if drafter else {}
        self._order = {name: i for i, name in enumerate([*self.shapes, *self._of_drafter])}

    def check(self, cfg: Config) -> int:
        """The bytes of all tensors."""
        return sum(map(self.nbytes, self.shapes))

    def check_drafter(self, cfg: Config) -> tuple[Drafter, int]:
        """Which there is, and the bytes of its tensors."""
        assert self.drafter is not None
        return self.drafter, sum(map(self.nbytes, self._of_drafter))

    def read(self, name: str, shape: Shape, below: int | None = None) -> HostTensor:
        name = self._source(name)
        seed = self.seed * 1_000_003 + self._order[name]
        rng = np.random.default_rng((self.seed, self._order[name]))
        if below is not None:
            return HostTensor("int", self.popularity.table(rng, shape[0]))
        if name.endswith("gate.bias"):
            return HostTensor("f32", self.popularity.bias(rng))
        return self._described(name, shape, seed)

    def read_stacked(self, names: list[str], shape: Shape) -> HostTensor:
        """Experts of a layer, all of them or some: part of one stack."""
        ids = [int(name.rpartition(".experts.")[2].partition(".")[0]) for name in names]
        path, _, rest = names[0].rpartition(f".{ids[0]}.")
        one = self.read(f"{path}.0.{rest}", shape)
        assert isinstance(one, SyntheticTensor)
        stack = one.of_shape(self.cfg.n_routed_experts, *shape)
        return stack if len(ids) == self.cfg.n_routed_experts else stack.only(ids)

    def _source(self, name: str) -> str:
        """The name whose values a tensor has."""
        first, _, rest = name.partition(".")
        if first != "layers":
            return name
        layer, _, rest = rest.partition(".")
        return f"layers.{self.same_as[int(layer)]}.{rest}"

    def kept(self) -> list[str]:
        """The tensors that a loader keeps: of equal layers the first."""
        return [name for name in self.shapes if self._source(name) == name]

    def nbytes(self, name: str) -> int:
        """The bytes of one tensor."""
        shape = (self.shapes | self._of_drafter)[name]
        table = name.endswith("tid2eid")
        return 8 * math.prod(shape) if table else self._described(name, shape, 0).nbytes

    def _described(self, name: str, shape: Shape, seed: int) -> SyntheticTensor:
        std, mean = _size(name, shape)
        chosen = None if self.recipe is None else self.recipe.format_of(name, shape[-1])
        if chosen is None:
            kind = storage_format(name, self.cfg.expert_dtype)
            return SyntheticTensor(Description(kind, shape, seed, std, mean))
        bits, group = (chosen.bits, chosen.group) if chosen.mode == "affine" else (0, 0)
        return SyntheticTensor(Description(chosen.mode, shape, seed, std, mean, bits, group))


def shared_layers(cfg: Config, unique: int | None) -> Mapping[int, int]:
    """Layer -> the layer whose weights it has. Raises ConfigError if a kind would have none."""
    kinds = [
        (cfg.compress_ratios[layer], layer < cfg.num_hash_layers)
        for layer in range(cfg.num_hidden_layers)
    ]
    own = len(kinds) if unique is None else unique
    source: dict[int, int] = {}
    turns: dict[tuple[int, bool], int] = {}
    for layer, kind in enumerate(kinds):
        alike = [i for i in range(min(own, len(kinds))) if kinds[i] == kind]
        if layer < own:
            source[layer] = layer
            continue
        if not alike:
            raise ConfigError(
                f"unique layers must be at least {layer + 1} for this model: layer {layer} is the "
                f"first of its kind, not {own}"
            )
        turns[kind] = turns.get(kind, -1) + 1
        source[layer] = alike[turns[kind] % len(alike)]
    return source


def _size(name: str, shape: Shape) -> tuple[float, float]:
    """Standard deviation and mean of a tensor's values."""
    if "norm" in name:
        return 0.3, 1.0
    if name.endswith("_scale"):
        return 0.25, 1.0
    if len(shape) == 2 and not name.endswith("ape") and name != "embed.weight":
        return float(shape[-1] ** -0.5), 0.0
    return 1.0, 0.0
