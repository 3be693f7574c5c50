"""What both of this folder's backends do where several processes run a model together."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ds4.config import Config
from ds4.ranks import Alone, balanced, share
from ds4.weights.tensor import HostTensor

from . import heads
from .ranks import Group


class Ranked:
    """Keeps this rank's share of the experts, and of what else can be shared out (heads.py)."""

    ranks: Group | Alone
    split_heads = True  # attention by heads; else every rank computes all of it
    _cut: Mapping[str, int] = MappingProxyType({})

    def begin(self, cfg: Config) -> None:
        """Decide how the model of this config is shared out, before its weights are loaded."""
        self._cut = heads.axes(cfg, self.ranks, self.split_heads)

    @property
    def has_shared(self) -> bool:
        """Whether this rank has the shared expert, or a part of it."""
        return self.ranks.rank == 0 or heads.SHARED.keys() <= self._cut.keys()

    def load(self, name: str, tensor: HostTensor) -> Any:
        w = self.keep(name, heads.part(name, tensor, self.ranks, self._cut))
        summed = heads.SUMMED in self._cut and name.endswith(heads.SUMMED)
        return heads.Summed(w) if summed else w

    def keep(self, name: str, tensor: HostTensor) -> Any:
        """`load` of what is to be kept here."""
        raise NotImplementedError

    def holds(self, layer: int, experts: int) -> Sequence[int] | None:
        if isinstance(self.ranks, Alone):
            return None
        popularity = self.ranks.crew.popularity
        if popularity is None or len(popularity) <= layer or len(popularity[layer]) != experts:
            return share(experts, self.ranks)
        return balanced(popularity[layer], self.ranks)
