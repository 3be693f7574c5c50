"""What both of this folder's backends do where several processes run a model together."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ds4.config import Config
from ds4.ranks import Alone, balanced, share
from ds4.weights.tensor import HostTensor

from . import heads
from .ranks import Group


class Ranked:
    """Keeps this rank's share of the experts and, where that can be shared out, of the heads."""

    ranks: Group | Alone
    split_heads = True  # attention by heads; else every rank computes all of it
    _by_heads = False

    if TYPE_CHECKING:  # what the rest of the backend has, in whichever order its parts are named

        def keep(self, name: str, tensor: HostTensor) -> Any:
            """`load` of what is to be kept here."""

    def begin(self, cfg: Config) -> None:
        """Decide how the model of this config is shared out, before its weights are loaded."""
        self._by_heads = self.split_heads and heads.can_split(cfg, self.ranks)

    def load(self, name: str, tensor: HostTensor) -> Any:
        if not self._by_heads:
            return self.keep(name, tensor)
        w = self.keep(name, heads.part(name, tensor, self.ranks))
        return heads.Summed(w) if name.endswith(heads.SUMMED) else w

    def holds(self, layer: int, experts: int) -> Sequence[int] | None:
        if isinstance(self.ranks, Alone):
            return None
        popularity = self.ranks.crew.popularity
        if popularity is None or len(popularity) <= layer or len(popularity[layer]) != experts:
            return share(experts, self.ranks)
        return balanced(popularity[layer], self.ranks)
