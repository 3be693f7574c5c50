"""What operations leave to the ones after them, which then do both in one launch."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds4.backend import Weights
from ds4.config import Config
from ds4.step import Step

from .activation import Activation
from .kernels import embed, gemv, hyper
from .kernels.router import Gate, Tiles, route_small
from .qmatrix import QMatrix
from .weights import dense


@dataclass(frozen=True)
class Embedded:
    """Streams that are still the embedding's rows."""

    table: Any
    tokens: Tensor


@dataclass(frozen=True)
class Mixed:
    """Streams before a sublayer, and its output, which is still to go into them."""

    streams: Tensor  # (T, 4, D)
    y: Tensor  # (T, D), or (T, P, D) in P parts
    mix: hyper.Mix
    y2: Tensor | None = None  # (T, D), another part
    rows: Tensor | None = None  # only these tokens are wanted

    def mixed(self) -> Tensor:
        """(T or rows, 4, D): the streams after the sublayer, in PyTorch's operations."""
        streams, y, y2, (post, comb) = self.streams, self.y, self.y2, self.mix
        if self.rows is not None:
            streams, y, post, comb = (x[self.rows] for x in (streams, y, post, comb))
            y2 = None if y2 is None else y2[self.rows]
        y = y.sum(1) if y.ndim == 3 else y
        y = y if y2 is None else y + y2
        count = streams.shape[1]
        return torch.baddbmm(post[:, :, None] * y[:, None], comb.view(-1, count, count).mT, streams)


@dataclass(frozen=True)
class Chosen:
    """The experts of each token, and the order in which the kernels take them."""

    ids: Tensor  # int32 (T, K)
    order: Any  # Tiles, or gemm's Routed


@dataclass(frozen=True)
class Asked:
    """What the router of a small step is asked: `experts` lets it answer beside the shared one."""

    router: QMatrix
    gate: Gate
    x: Activation
    step: Step

    def product(self) -> gemv.Product:
        z = torch.empty(len(self.x), self.router.rows, device=self.x.data.device)
        return gemv.Product(self.router, self.x.data, z)

    def answer(self, product: gemv.Product) -> tuple[Tensor, Tensor, Tiles]:
        """Ids, weights and tiles: see route_small."""
        return route_small(self.gate, product.out, self.step.tokens, pos=self.step.pos)

    @property
    def ids(self) -> Tensor:
        """What the experts will be, for those who want to know."""
        product = self.product()
        gemv.linears([product], len(self.x))
        return self.answer(product)[0]


@dataclass(frozen=True)
class Head:
    """The streams of the wanted tokens, still to be weighed into one and normed."""

    w: Weights
    h: Mixed
    cfg: Config
    single: int = hyper.SINGLE

    def normed(self, norm: Tensor, eps: float, device: str) -> Activation:
        w, h = self.w, self.h
        count = len(h.y) if h.rows is None else len(h.rows)
        x = Activation.empty(count, h.streams.shape[2], device)
        rows = torch.arange(count, dtype=torch.int32, device=device) if h.rows is None else h.rows
        hyper.head(
            h.streams,
            h.y,
            h.mix,
            w.fn,
            w.scale,
            w.base,
            norm,
            rows,
            x.data,
            x.strides,
            eps=eps,
            hc_eps=self.cfg.hc_eps,
            y2=h.y2,
            single=self.single,
        )
        return x

    def state(self) -> Tensor:
        """(T or rows, D): the streams weighed into one, before the norm, for drafters."""
        w, x, cfg = self.w, self.h.mixed(), self.cfg
        flat = F.rms_norm(x.flatten(1), (x.shape[1] * x.shape[2],), eps=cfg.rms_norm_eps)
        pre = (F.linear(flat, dense(w.fn)) * w.scale + w.base).sigmoid() + cfg.hc_eps
        return (pre[:, :, None] * x).sum(1)


def rows_of(h: Embedded) -> tuple[Tensor, Tensor]:
    """A table of plain values and the rows of it that are wanted."""
    if isinstance(h.table, Tensor):
        return h.table, h.tokens
    every = torch.arange(len(h.tokens), dtype=torch.int32, device=h.tokens.device)
    if embed.serves(h.table):
        return embed.rows(h.table, h.tokens), every
    return dense(h.table[h.tokens]), every
