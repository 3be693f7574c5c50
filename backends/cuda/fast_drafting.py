"""What drafters ask for, beside the kernels of the model's own steps (fast.py).

All of it can be recorded in a CUDA graph. The matrices are read by the same kernels as the model's;
between them are PyTorch's operations on a few rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds4.backend import Weights
from ds4.config import Config
from ds4.step import Step

from .activation import Activation
from .drafting import attend, confidence_of
from .kernels.hyper import Mix
from .qmatrix import QMatrix
from .rounding import round_kv
from .rows import PackedRows, values_of
from .weights import dense

Parts = Any  # streams before a sublayer and what is to go into them: fast.Mixed


@dataclass(frozen=True)
class Plain:
    """Streams as they are, where fast.Mixed is awaited: nothing is still to go into them."""

    streams: Tensor
    y: Tensor
    mix: Mix
    y2: Tensor | None = None
    rows: Tensor | None = None

    @classmethod
    def of(cls, h: Tensor) -> "Plain":
        """(T, H, D): new streams are the old ones, and 0 times an output of zeros."""
        tokens, streams, width = h.shape
        none = h.new_zeros(tokens, streams)
        same = torch.eye(streams, device=h.device).flatten().repeat(tokens, 1)
        return cls(h, h.new_zeros(tokens, width), (none, same))


def mixed(h: Parts) -> Tensor:
    """(T or rows, H, D): the streams after the sublayer whose output still waits."""
    streams, y, y2, (post, comb) = h.streams, h.y, h.y2, h.mix
    if h.rows is not None:
        rows = h.rows
        streams, y, post, comb = streams[rows], y[rows], post[rows], comb[rows]
        y2 = None if y2 is None else y2[rows]
    if y.ndim == 3:
        y = y.sum(1)
    if y2 is not None:
        y = y + y2
    count = streams.shape[1]
    return torch.baddbmm(post[:, :, None] * y[:, None], comb.view(-1, count, count).mT, streams)


class FastDrafting:
    """For Fast. `h` is its Mixed, activations are its Activation."""

    def streams(self, h: Parts) -> Tensor:
        return mixed(h).flatten(1)

    def tap(self, h: Parts) -> Tensor:
        return mixed(h).mean(1)

    def recall(self, ring: PackedRows, step: Step) -> Tensor:
        assert ring.data is not None  # of kind "float"
        at = torch.where(step.pos < 0, ring.size, step.pos % ring.size)
        return ring.data[step.slot, at]

    def join(self: Any, w: Weights, embed: Any, step: Step, x: Tensor, cfg: Config) -> Plain:
        e, eps = dense(embed[step.tokens]), cfg.rms_norm_eps
        streams = x.view(len(x) * cfg.hc_mult, -1)
        of_token = self.linear(w.e_proj, self.rms_norm(w.enorm, e, eps))
        of_streams = self.linear(w.h_proj, self.rms_norm(w.hnorm, streams, eps))
        return Plain.of(of_streams.view(len(x), cfg.hc_mult, -1) + of_token[:, None])

    def fuse(
        self: Any, proj: QMatrix, norm: Tensor, parts: Sequence[Tensor], eps: float
    ) -> Activation:
        side_by_side = Activation.of(torch.cat(list(parts), -1))
        normed: Activation = self.rms_norm(norm, self.linear(proj, side_by_side), eps)
        return normed

    def attend_block(
        self: Any,
        w: Weights,
        ring: PackedRows,
        step: Step,
        q: Tensor,
        kv: Tensor,
        size: int,
        cfg: Config,
    ) -> Activation:
        self._remembered()

        def past(slot: Tensor, at: Tensor) -> Tensor:
            return values_of(ring, (slot, at % ring.size))

        def rounded(rows: Tensor) -> Tensor:
            return rows if ring.data is not None else round_kv(rows, ring.rotary)

        return Activation.of(attend(w, past, rounded, step, q, kv, size, cfg).flatten(1))

    def markov(
        self: Any, w: Weights, base: Tensor, hidden: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = dense(w.w1[tokens])
        return base + self.linear(w.w2, Activation.of(rows)), confidence_of(w, hidden, rows)


def head_state(w: Weights, h: Parts, cfg: Config) -> Tensor:
    """(T, D) float32: what hc_head returns, before the norm that is fused with it."""
    x = mixed(h)
    flat = F.rms_norm(x.flatten(1), (x.shape[1] * x.shape[2],), eps=cfg.rms_norm_eps)
    pre = (F.linear(flat, dense(w.fn)) * w.scale + w.base).sigmoid() + cfg.hc_eps
    return (pre[:, :, None] * x).sum(1)
