"""What drafters ask for, beside the kernels of the model's own steps (fast.py).

All of it can be recorded in a CUDA graph. The matrices are read by the same kernels as the model's;
between them are PyTorch's operations on a few rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds4.backend import Weights
from ds4.config import Config
from ds4.step import Step

from .activation import Activation
from .drafting import attend, confidence_of
from .pending import Mixed
from .qmatrix import QMatrix
from .rounding import round_kv
from .rows import PackedRows, values_of
from .weights import dense


class FastDrafting:
    """For Fast: streams are its Mixed, and what feeds a matrix is its Activation."""

    def streams(self, h: Mixed) -> Tensor:
        return h.mixed().flatten(1)

    def tap(self, h: Mixed) -> Tensor:
        return h.mixed().mean(1)

    def recall(self, ring: PackedRows, step: Step) -> Tensor:
        assert ring.data is not None  # of kind "float"
        at = torch.where(step.pos < 0, ring.size, step.pos % ring.size)
        return ring.data[step.slot, at]

    def join(self: Any, w: Weights, embed: Any, step: Step, x: Tensor, cfg: Config) -> Mixed:
        e, eps = dense(embed[step.tokens]), cfg.rms_norm_eps
        streams = x.view(len(x) * cfg.hc_mult, -1)
        of_token = self.linear(w.e_proj, self.rms_norm(w.enorm, e, eps))
        of_streams = self.linear(w.h_proj, self.rms_norm(w.hnorm, streams, eps))
        return Mixed.plain(of_streams.view(len(x), cfg.hc_mult, -1) + of_token[:, None])

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
