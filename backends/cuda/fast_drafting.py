"""What drafters ask for, beside the kernels of the model's own steps (fast.py).

All of it can be recorded in a CUDA graph. The matrices are read by the same kernels as the model's;
between them are PyTorch's operations on a few rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ds4.backend import Weights
from ds4.config import Config
from ds4.step import Step

from .activation import Activation
from .drafting import Weighing, attend, confidence_of
from .kernels import draft
from .pending import Embedded, Mixed, rows_of
from .qmatrix import QMatrix
from .rounding import round_kv
from .rows import PackedRows, values_of
from .weights import dense


@dataclass(frozen=True)
class Recalled:
    """Float rows that are still to be read: those at a step's slots and positions."""

    ring: PackedRows
    step: Step


class FastDrafting(Weighing):
    """For Fast: streams are its Mixed, and what feeds a matrix is its Activation."""

    def streams(self, h: Mixed) -> Mixed:
        return h  # made where they are stored

    def tap(self, h: Mixed) -> Tensor:
        return draft.mean_of_streams(h)

    def recall(self, ring: PackedRows, step: Step) -> Recalled:
        return Recalled(ring, step)

    def join(self: Any, w: Weights, embed: Any, step: Step, x: Recalled, cfg: Config) -> Mixed:
        table, ids = rows_of(Embedded(embed, step.tokens))
        at, eps = (x.ring, x.step.slot, x.step.pos), cfg.rms_norm_eps
        streams, token = draft.join_inputs(*at, table, ids, w.hnorm, w.enorm, eps)
        of_streams, of_token = self.linear(w.h_proj, streams), self.linear(w.e_proj, token)
        mix = draft.same_streams(len(token), of_token.device)
        return Mixed(of_streams.view(len(token), cfg.hc_mult, -1), of_token, mix)

    def fuse(
        self: Any, proj: QMatrix, norm: Tensor, parts: Sequence[Tensor], eps: float
    ) -> Activation:
        normed: Activation = self.rms_norm(norm, self.linear(proj, draft.side_by_side(parts)), eps)
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

        return draft.side_by_side([attend(w, past, rounded, step, q, kv, size, cfg).flatten(1)])

    def markov(
        self: Any, w: Weights, base: Tensor, hidden: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = dense(w.w1[tokens])
        return base + self.linear(w.w2, draft.side_by_side([rows])), confidence_of(w, hidden, rows)
