"""What drafters ask for, beside the kernels of the model's own steps (fast.py).

All of it can be recorded in a CUDA graph. The matrices are read by the same kernels as the model's;
between them are PyTorch's operations on a few rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds4.backend import Weights
from ds4.config import Config
from ds4.errors import BackendError
from ds4.step import Step

from .activation import Activation
from .coming import Coming
from .drafting import Weighing
from .kernels import draft, sample
from .kernels.attention import attention
from .kernels.draw import draw
from .kernels.remember import remember
from .nvrtc import compiling
from .pending import Embedded, Mixed, rows_of
from .qmatrix import QMatrix
from .rows import PackedRows
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
        """The block's rows do lie in the ring for a while: where the model's own will come."""
        self._remembered()
        window, eps = cfg.sliding_window, cfg.rms_norm_eps
        if ring.size < window + size:
            raise BackendError(f"a context of fewer than {size} tokens is too short for DSpark")
        at = step.slot, step.pos
        remember(kv, w.kv_norm, w.freqs, ring, [], *at, None, 0, eps)
        ids = draft.rows_seen(step.pos, size, window, ring.size)
        out = Activation.empty(len(q), q.shape[1] * q.shape[2], q.device)
        planes, none = ring.planes, 0  # every row that is seen is one of `ids`
        head = q, w.freqs, w.attn_sink, *at, ids, planes, planes, 1, none, eps
        attention(*head, out.data, *out.strides, span=step.span)
        return out

    def markov(
        self: Any, w: Weights, base: Tensor, hidden: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        table, ids = rows_of(Embedded(w.w1, tokens))
        rows, sure = draft.markov_inputs(table, ids, hidden, dense(w.confidence))
        return base + self.linear(w.w2, rows), sure

    def best(self, logits: Tensor) -> Tensor:
        return sample.greedy(logits, _tokens(logits))

    def drawn(self, logits: Tensor, how: Tensor) -> Tensor:
        temperature, top_k, top_p, min_p, u = (x[: len(logits)] for x in how)
        return draw(logits, temperature, top_k.int(), top_p, min_p, u, _tokens(logits))

    def coming(self, x: Tensor) -> Tensor:
        seen = x.view_as(x)  # what a recording leaves is the same every time
        seen.coming = Coming(x)  # type: ignore[attr-defined]
        return seen


def _tokens(logits: Tensor) -> Tensor:
    """Room for tokens: rows of a table even where what chooses them is compiled and not run."""
    empty = torch.empty if compiling.get() is None else torch.zeros
    return empty(len(logits), dtype=torch.int32, device=logits.device)
