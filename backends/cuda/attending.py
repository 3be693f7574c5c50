"""Attention and its caches in PyTorch operations: a part of ops.py's backend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ds4.backend import CacheMode, RowKind, Weights
from ds4.config import Config
from ds4.quant import formats
from ds4.quant.rows import RowFormat
from ds4.step import Step

from .rounding import round_index, round_kv
from .weights import dense

NEVER = float("-inf")


@dataclass(frozen=True)
class Rows:
    kind: RowKind
    data: Tensor  # (slots, size + 1, width): the last row takes what padding writes
    rotary: int
    format: RowFormat

    @property
    def size(self) -> int:
        return self.data.shape[1] - 1

    @property
    def planes(self) -> list[Tensor]:
        return [self.data]

    @property
    def row_bytes(self) -> int:
        return self.format.row_bytes

    def export(self, slot: int, start: int, stop: int) -> Tensor:
        """uint8 (n, row_bytes): rows in their packed form."""
        rows = self.format.encode(self.data[slot, start:stop].cpu().numpy())
        return torch.from_numpy(rows).to(self.data.device)

    def restore(self, slot: int, start: int, rows: Tensor) -> None:
        values = torch.from_numpy(self.format.decode(rows.cpu().numpy()))
        self.data[slot, start : start + len(rows)] = values.to(self.data.device)


class Attending:
    """What a layer's attention does with its caches."""

    device: str
    cache: CacheMode
    _hadamard: dict[int, Tensor]

    if TYPE_CHECKING:  # what the rest of the backend has, in whichever order its parts are named

        def rms_norm(self, w: Tensor | None, x: Tensor, eps: float) -> Tensor:
            """x over the root of the mean square of its last axis."""

        def _rope(self, x: Tensor, pos: Tensor, freqs: Tensor, inverse: bool = False) -> Tensor: ...

    def write(self, ring: Rows, rows: Tensor, step: Step) -> None:
        at = torch.where(step.pos < 0, ring.size, step.pos % ring.size)
        ring.data[step.slot, at] = self._rounded(ring, rows)

    def remember(
        self, w: Weights, c: Any, step: Step, kv: Tensor, projected: Sequence[Tensor], cfg: Config
    ) -> None:
        kv = self.rms_norm(w.kv_norm, kv, cfg.rms_norm_eps)
        self.write(c.window, self._rope(kv, step.pos, w.freqs), step)
        indexer = w.indexer.compressor if w.indexer else None
        compressors = (w.compressor, c.rows, c.pool), (indexer, c.index_rows, c.index_pool)
        for (m, ring, pool), rows in zip(compressors, projected, strict=False):
            self.write(ring, rows, step)
            emit = step.emit[w.ratio]
            self._compress(m, ring, pool, emit, w.freqs, w.ratio, cfg.rms_norm_eps)

    def _compress(
        self,
        w: Weights,
        ring: Rows,
        pool: Rows,
        emit: Tensor,
        freqs: Tensor,
        ratio: int,
        eps: float,
    ) -> None:
        if not len(emit):
            return
        d, slot, block = pool.data.shape[-1], emit[:, 0], emit[:, 1]
        before = ratio if ratio == 4 else 0
        at = block[:, None] * ratio + torch.arange(-before, ratio, device=self.device)
        kv, gate = ring.data[slot[:, None], at % ring.size].chunk(2, -1)
        gate = gate.unflatten(1, (-1, ratio)) + dense(w.ape)
        gate = gate.flatten(1, 2)
        if before:  # the earlier block shows its first half of channels, the own block its second
            kv = torch.cat([kv[:, :before, :d], kv[:, before:, d:]], 1)
            gate = torch.cat([gate[:, :before, :d], gate[:, before:, d:]], 1)
        unseen = (at < 0)[:, :, None] & (block >= 0)[:, None, None]
        gate = gate.masked_fill(unseen, NEVER).softmax(1)
        entry = (kv.masked_fill(unseen, 0) * gate).sum(1)
        entry = self._rope(self.rms_norm(w.norm, entry, eps), block * ratio, freqs)
        pool.data[slot, torch.where(block < 0, pool.size, block)] = self._rounded(pool, entry)

    def _rounded(self, into: Rows, rows: Tensor) -> Tensor:
        if self.cache == "exact" or into.kind == "float":
            return rows
        if into.kind == "kv":
            return round_kv(rows, into.rotary)
        n = rows.shape[-1]
        if n not in self._hadamard:
            self._hadamard[n] = torch.from_numpy(formats.hadamard(n)).to(self.device)
        return round_index(rows, self._hadamard[n])

    def index(
        self,
        q: Tensor,
        weights: Tensor,
        pool: Rows,
        step: Step,
        freqs: Tensor,
        ratio: int,
        k: int,
    ) -> Tensor:
        entries = min(step.span // ratio, pool.size)
        q = self._rounded(pool, self._rope(q, step.pos, freqs))
        hidden = torch.arange(entries, device=self.device) >= ((step.pos + 1) // ratio)[:, None]
        scores = torch.full(hidden.shape, NEVER, device=self.device)
        for slot in step.slot.unique().tolist():
            t = step.slot == slot
            products = (q[t] @ pool.data[slot, :entries].mT).relu_()
            scores[t] = (weights[t][:, None] @ products)[:, 0]
        scores, ids = largest(scores.masked_fill(hidden, NEVER), k)
        return ids.masked_fill(scores == NEVER, -1)

    def attention(
        self, w: Weights, c: Any, step: Step, q: Tensor, ids: Tensor | None, cfg: Config
    ) -> Tensor:
        ring, pool, ratio = c.window, c.pool, w.ratio
        q = self._rope(self.rms_norm(None, q, cfg.rms_norm_eps), step.pos, w.freqs)
        slot = step.slot[:, None]
        at = step.pos[:, None] - torch.arange(cfg.sliding_window, device=self.device)
        keys, seen = ring.data[slot, at % ring.size], at >= 0
        if pool is not None:
            if ids is None:
                entries = torch.arange(min(step.span // ratio, pool.size), device=self.device)
                visible = ((step.pos + 1) // ratio)[:, None]
                ids = torch.where(entries < visible, entries, -1)
            keys = torch.cat([keys, pool.data[slot, ids]], 1)  # -1 is the scratch row
            seen = torch.cat([seen, ids >= 0], 1)
        keys = keys.masked_fill(~seen[..., None], 0)  # what was never written may be NaN
        logits = (q @ keys.mT) * q.shape[-1] ** -0.5
        logits = logits.masked_fill(~seen[:, None], NEVER)
        logits = torch.cat([logits, w.attn_sink[:, None].expand(len(q), -1, 1)], -1)
        o = logits.softmax(-1)[..., :-1] @ keys
        return self._rope(o, step.pos, w.freqs, inverse=True)


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest along the last axis, best first, and their indices; of equals the lower one."""
    values, ids = x.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], ids[..., :k]
