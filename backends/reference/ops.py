"""The interface in plain NumPy: what the other backends are tested against.

Everything is float32. Each operation reads like its formula; where a loop over tokens is the
clearest way to say it, there is a loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds4.backend import CacheMode, RowKind, RowRange, StepFunction, Weights
from ds4.config import Config
from ds4.errors import BackendError
from ds4.quant import formats
from ds4.quant.rows import RowFormat
from ds4.step import Step
from ds4.weights.tensor import HostTensor

from .drafting import Drafting
from .formulas import largest, sigmoid, softmax, swiglu, times

Array = NDArray[Any]
f32 = np.float32


@dataclass(frozen=True)
class Rows:
    kind: RowKind
    data: Array  # (slots, size + 1, width): the last row takes what padding writes
    rotary: int

    @property
    def size(self) -> int:
        return self.data.shape[1] - 1

    def format(self, mode: CacheMode) -> RowFormat:
        kind = "float" if mode == "exact" else self.kind
        return RowFormat(kind, self.data.shape[2], self.rotary)


class Reference(Drafting):
    name = "reference"

    def __init__(self, device: str = "auto", cache: CacheMode = "native") -> None:
        if device not in ("auto", "cpu"):
            raise BackendError(f"the reference backend runs on the cpu, not on {device!r}")
        self.device = "cpu"
        self.cache: CacheMode = cache

    # memory

    def load(self, name: str, tensor: HostTensor) -> Array:
        return tensor.decode()

    def alloc(self, kind: RowKind, slots: int, rows: int, width: int, rotary: int = 0) -> Rows:
        return Rows(kind, np.zeros((slots, rows + 1, width), f32), rotary)

    def upload(self, host: Array) -> Array:
        return host

    def download(self, x: Array) -> Array:
        return x

    def save(self, slot: int, ranges: Sequence[RowRange]) -> Array:
        parts = [
            r.rows.format(self.cache).encode(r.rows.data[slot, r.start : r.stop]) for r in ranges
        ]
        return np.concatenate([np.zeros(0, np.uint8), *(part.ravel() for part in parts)])

    def restore(self, slot: int, ranges: Sequence[RowRange], data: Array) -> None:
        at = 0
        for r in ranges:
            form = r.rows.format(self.cache)
            end = at + (r.stop - r.start) * form.row_bytes
            rows = data[at:end].reshape(-1, form.row_bytes)
            r.rows.data[slot, r.start : r.stop] = form.decode(rows)
            at = end

    def copy(self, source: int, target: int, ranges: Sequence[RowRange]) -> None:
        for r in ranges:
            r.rows.data[target, r.start : r.stop] = r.rows.data[source, r.start : r.stop]

    def capture(self, fn: StepFunction) -> StepFunction:
        return lambda step: fn(step.on(self))

    # dense

    def embed(self, w: Array, tokens: Array, copies: int) -> Array:
        return np.repeat(w[tokens][:, None], copies, 1)

    def linear(self, w: Array, x: Array) -> Array:
        return times(x, w)

    def linears(self, ws: Sequence[Array], x: Array) -> list[Array]:
        return [self.linear(w, x) for w in ws]

    def grouped_linear(self, w: Array, x: Array) -> Array:
        return np.stack([times(x[:, g], w[g]) for g in range(len(w))], 1)

    def rms_norm(self, w: Array | None, x: Array, eps: float) -> Array:
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + f32(eps))
        return y if w is None else y * w

    def _rope(self, x: Array, pos: Array, freqs: Array, inverse: bool = False) -> Array:
        angle = pos.astype(f32)[:, None] * freqs
        cos, sin = np.cos(angle), np.sin(-angle if inverse else angle)
        if x.ndim == 3:
            cos, sin = cos[:, None], sin[:, None]
        turned = x.copy()
        tail = turned[..., -2 * len(freqs) :]
        a, b = tail[..., ::2].copy(), tail[..., 1::2].copy()
        tail[..., ::2] = a * cos - b * sin
        tail[..., 1::2] = a * sin + b * cos
        return turned

    # hyper-connections

    def hc_pre(self, w: Weights, norm: Array, h: Array, cfg: Config) -> tuple[Array, Any]:
        H, eps = cfg.hc_mult, f32(cfg.hc_eps)
        m = self._mixes(w, h, cfg)
        pre = sigmoid(m[:, :H] * w.scale[0] + w.base[:H]) + eps
        post = 2 * sigmoid(m[:, H : 2 * H] * w.scale[1] + w.base[H : 2 * H])
        comb = softmax((m[:, 2 * H :] * w.scale[2] + w.base[2 * H :]).reshape(-1, H, H)) + eps
        comb /= comb.sum(1, keepdims=True) + eps  # by column first
        for _ in range(cfg.hc_sinkhorn_iters - 1):
            comb /= comb.sum(2, keepdims=True) + eps
            comb /= comb.sum(1, keepdims=True) + eps
        x = (pre[:, :, None] * h).sum(1)
        return self.rms_norm(norm, x, cfg.rms_norm_eps), (post, comb)

    def hc_post(self, x: Array, h: Array, mix: Any) -> Array:
        post, comb = mix
        return post[:, :, None] * x[:, None] + comb.swapaxes(1, 2) @ h  # sums over the in stream

    def hc_head(self, w: Weights, h: Array, cfg: Config) -> Array:
        pre = sigmoid(self._mixes(w, h, cfg) * w.scale + w.base) + f32(cfg.hc_eps)
        return (pre[:, :, None] * h).sum(1)

    def _mixes(self, w: Weights, h: Array, cfg: Config) -> Array:
        return times(self.rms_norm(None, h.reshape(len(h), -1), cfg.rms_norm_eps), w.fn)

    # feed-forward

    def _shared(self, w: Weights, x: Array, limit: float) -> Array:
        return times(swiglu(times(x, w.w1), times(x, w.w3), limit), w.w2)

    def route(self, w: Weights, x: Array, step: Step, cfg: Config) -> tuple[Array, Array]:
        z = times(x, w.weight)
        scores = np.sqrt(np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z))))
        if w.tid2eid is not None:
            ids = w.tid2eid[step.tokens]
        else:
            ids = largest(scores + w.bias, cfg.num_experts_per_tok)
        weights = np.take_along_axis(scores, ids, -1)
        total = weights.sum(-1, keepdims=True) + f32(1e-20)
        return ids, weights / total * f32(cfg.routed_scaling_factor)

    def experts(self, w: Weights, x: Array, ids: Array, weights: Array, limit: float) -> Array:
        y, routed = self._shared(w.shared_experts, x, limit), w.experts
        for e in np.unique(ids):
            token, pick = np.nonzero(ids == e)
            a = swiglu(times(x[token], routed.w1[e]), times(x[token], routed.w3[e]), limit)
            np.add.at(y, token, times(a * weights[token, pick, None], routed.w2[e]))
        return y

    # attention and its caches

    def write(self, ring: Rows, rows: Array, step: Step) -> None:
        at = np.where(step.pos < 0, ring.size, step.pos % ring.size)
        ring.data[step.slot, at] = self._rounded(ring, rows)

    def remember(
        self, w: Weights, c: Any, step: Step, kv: Array, projected: Sequence[Array], cfg: Config
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
        self, w: Weights, ring: Rows, pool: Rows, emit: Array, freqs: Array, ratio: int, eps: float
    ) -> None:
        d = pool.data.shape[-1]
        for slot, block in emit:
            if block < 0:
                continue
            now = np.arange(block * ratio, (block + 1) * ratio)
            kv, gate = np.split(ring.data[slot, now % ring.size], 2, -1)
            kv, gate = kv[:, -d:], (gate + w.ape)[:, -d:]
            if ratio == 4 and block > 0:
                old_kv, old_gate = np.split(ring.data[slot, (now - ratio) % ring.size], 2, -1)
                kv = np.concatenate([old_kv[:, :d], kv])
                gate = np.concatenate([(old_gate + w.ape)[:, :d], gate])
            entry = (kv * softmax(gate, 0)).sum(0, keepdims=True)
            entry = self._rope(self.rms_norm(w.norm, entry, eps), now[:1], freqs)
            pool.data[slot, block] = self._rounded(pool, entry)[0]

    def _rounded(self, into: Rows, rows: Array) -> Array:
        if self.cache == "exact" or into.kind == "float":
            return rows
        if into.kind == "kv":
            return formats.round_kv(rows, into.rotary)
        return formats.round_q4(rows @ formats.hadamard(rows.shape[-1]))

    def index(
        self, q: Array, weights: Array, pool: Rows, step: Step, freqs: Array, ratio: int, k: int
    ) -> Array:
        entries = min(step.span // ratio, pool.size)
        q = self._rounded(pool, self._rope(q, step.pos, freqs))
        scores = np.full((len(q), entries), -np.inf, f32)
        for t, (slot, pos) in enumerate(zip(step.slot, step.pos, strict=True)):
            keys = pool.data[slot, : (pos + 1) // ratio]
            scores[t, : len(keys)] = weights[t] @ np.maximum(q[t] @ keys.T, 0)
        ids = largest(scores, k)
        return np.where(np.take_along_axis(scores, ids, -1) == -np.inf, -1, ids)

    def attention(
        self, w: Weights, c: Any, step: Step, q: Array, ids: Array | None, cfg: Config
    ) -> Array:
        ring, pool, window = c.window, c.pool, cfg.sliding_window
        q = self._rope(self.rms_norm(None, q, cfg.rms_norm_eps), step.pos, w.freqs)
        o = np.zeros_like(q)
        for t, (slot, pos) in enumerate(zip(step.slot, step.pos, strict=True)):
            if pos < 0:
                continue
            keys = ring.data[slot, np.arange(max(0, pos - window + 1), pos + 1) % ring.size]
            if pool is not None:
                chosen = np.arange((pos + 1) // w.ratio) if ids is None else ids[t][ids[t] >= 0]
                keys = np.concatenate([keys, pool.data[slot, chosen]])
            logits = q[t] @ keys.T * f32(q.shape[-1] ** -0.5)
            weights = softmax(np.concatenate([logits, w.attn_sink[:, None]], -1))
            o[t] = weights[:, :-1] @ keys
        return self._rope(o, step.pos, w.freqs, inverse=True)

    # output

    def take(self, x: Array, rows: Array) -> Array:
        return x[rows]

    def gather(self, parts: Sequence[Array], rows: Array) -> Array:
        return np.concatenate(parts)[rows]

    def mask(self, logits: Array, allowed: Array) -> Array:
        bits = np.unpackbits(allowed.view(np.uint8), axis=-1, bitorder="little")
        return np.where(bits[:, : logits.shape[1]] == 1, logits, f32(-np.inf))

    def adjust(self, logits: Array, ids: Array, factor: Array, offset: Array) -> Array:
        adjusted = logits.copy()
        row, place = np.nonzero(ids >= 0)
        at = row, ids[row, place]
        old, f = logits[at], factor[row, place]
        adjusted[at] = np.where(old > 0, old / f, old * f) + offset[row, place]
        return adjusted

    def sample(
        self,
        logits: Array,
        temperature: Array,
        top_k: Array,
        top_p: Array,
        min_p: Array,
        u: Array,
    ) -> Array:
        picked = logits.argmax(-1)
        for r in np.nonzero(temperature > 0)[0]:
            order = np.argsort(-logits[r], kind="stable")[: top_k[r] or None]
            p = softmax(logits[r, order] / temperature[r])
            p = p[(p.cumsum() - p < top_p[r]) & (p >= min_p[r] * p[0])]
            running = p.cumsum()
            picked[r] = order[min((running <= u[r] * running[-1]).sum(), len(p) - 1)]
        return picked
