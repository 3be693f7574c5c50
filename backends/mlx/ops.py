"""The interface in MLX operations, with Metal on a Mac and on the CPU elsewhere.

Activations are float32. A cache is one mx.array under one name, replaced by each write: MLX then
updates the memory in place.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ds4.backend import CacheMode, RowKind, StepFunction, Weights
from ds4.config import Config
from ds4.errors import BackendError
from ds4.step import Step
from ds4.weights.tensor import HostTensor

from .rounding import round_index, round_kv
from .weights import Matrix, Weight, upload

Host = NDArray[Any]
NEVER = -float("inf")


@dataclass
class Rows:
    kind: RowKind
    data: mx.array  # (slots, size + 1, width): the last row takes what padding writes
    rotary: int

    @property
    def size(self) -> int:
        return self.data.shape[1] - 1


class Mlx:
    name = "mlx"

    def __init__(self, device: str = "auto", cache: CacheMode = "native") -> None:
        self.device = _device(device)
        self.cache: CacheMode = cache
        mx.set_default_device(mx.Device(mx.DeviceType.gpu if self.device == "gpu" else mx.cpu))

    # memory

    def load(self, name: str, tensor: HostTensor) -> Weight:
        return upload(tensor, self.device)

    def alloc(self, kind: RowKind, slots: int, rows: int, width: int, rotary: int = 0) -> Rows:
        return Rows(kind, mx.zeros((slots, rows + 1, width)), rotary)

    def upload(self, host: Host) -> mx.array:
        return mx.array(host)

    def download(self, x: mx.array) -> Host:
        return np.array(x)

    def capture(self, fn: StepFunction) -> StepFunction:
        return lambda step: fn(step.on(self))

    # dense

    def embed(self, w: Matrix, tokens: mx.array, copies: int) -> mx.array:
        return mx.repeat(w.rows(tokens)[:, None], copies, 1)

    def linear(self, w: Matrix, x: mx.array) -> mx.array:
        return w.matmul(x)

    def linears(self, ws: Sequence[Matrix], x: mx.array) -> list[mx.array]:
        return [self.linear(w, x) for w in ws]

    def grouped_linear(self, w: Matrix, x: mx.array) -> mx.array:
        return w.matmul(x.swapaxes(0, 1)).swapaxes(0, 1)

    def rms_norm(self, w: mx.array | None, x: mx.array, eps: float) -> mx.array:
        return mx.fast.rms_norm(x, w, eps)

    def _rope(self, x: mx.array, pos: mx.array, freqs: mx.array, inverse: bool = False) -> mx.array:
        n = 2 * freqs.size
        angle = pos[:, None] * freqs
        cos, sin = mx.cos(angle), mx.sin(-angle if inverse else angle)
        if x.ndim == 3:
            cos, sin = cos[:, None], sin[:, None]
        plain, tail = x[..., : x.shape[-1] - n], x[..., x.shape[-1] - n :]
        a, b = tail[..., ::2], tail[..., 1::2]
        turned = mx.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        return mx.concatenate([plain, turned], -1)

    # hyper-connections

    def hc_pre(self, w: Weights, norm: mx.array, h: mx.array, cfg: Config) -> tuple[mx.array, Any]:
        H, eps = cfg.hc_mult, cfg.hc_eps
        mixes = self._mixes(w, h, cfg) * w.scale[_thirds(H)] + w.base
        pre, post, comb = mx.split(mixes, [H, 2 * H], -1)
        pre, post = mx.sigmoid(pre) + eps, 2 * mx.sigmoid(post)
        comb = mx.softmax(comb.reshape(-1, H, H), -1) + eps
        comb = _sinkhorn(comb.reshape(-1, H * H), H, cfg.hc_sinkhorn_iters, eps)
        x = (pre[:, :, None] * h).sum(1)
        return self.rms_norm(norm, x, cfg.rms_norm_eps), (post, comb.reshape(-1, H, H))

    def hc_post(self, x: mx.array, h: mx.array, mix: Any) -> mx.array:
        post, comb = mix
        streams = post[:, :, None] * x[:, None] + comb.swapaxes(1, 2) @ h
        if self.device == "cpu":  # it computes while Python builds the next layer
            mx.async_eval(streams)
        return streams

    def hc_head(self, w: Weights, h: mx.array, cfg: Config) -> mx.array:
        pre = mx.sigmoid(self._mixes(w, h, cfg) * w.scale + w.base) + cfg.hc_eps
        return (pre[:, :, None] * h).sum(1)

    def _mixes(self, w: Weights, h: mx.array, cfg: Config) -> mx.array:
        return w.fn.matmul(self.rms_norm(None, h.flatten(1), cfg.rms_norm_eps))

    # feed-forward

    def _shared(self, w: Weights, x: mx.array, limit: float) -> mx.array:
        return w.w2.matmul(_swiglu(w.w1.matmul(x), w.w3.matmul(x), limit))

    def route(self, w: Weights, x: mx.array, step: Step, cfg: Config) -> tuple[mx.array, mx.array]:
        scores = mx.sqrt(mx.logaddexp(w.weight.matmul(x), 0.0))
        if w.tid2eid is not None:
            ids = w.tid2eid[step.tokens]
        else:
            ids = mx.argsort(-(scores + w.bias), -1)[:, : cfg.num_experts_per_tok]
        weights = mx.take_along_axis(scores, ids, -1)
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return ids, weights * cfg.routed_scaling_factor

    def experts(
        self, w: Weights, x: mx.array, ids: mx.array, weights: mx.array, limit: float
    ) -> mx.array:
        shared, e, x = self._shared(w.shared_experts, x, limit), w.experts, x[:, None, None]
        gate, up = e.w1.gather_matmul(x, ids), e.w3.gather_matmul(x, ids)
        y = e.w2.gather_matmul(_swiglu(gate, up, limit) * weights[..., None, None], ids)
        return y.squeeze(2).sum(1) + shared

    # attention and its caches

    def write(self, ring: Rows, rows: mx.array, step: Step) -> None:
        at = mx.where(step.pos < 0, ring.size, step.pos % ring.size)
        ring.data[step.slot, at] = self._rounded(ring, rows)

    def remember(
        self,
        w: Weights,
        c: Any,
        step: Step,
        kv: mx.array,
        projected: Sequence[mx.array],
        cfg: Config,
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
        emit: mx.array,
        freqs: mx.array,
        ratio: int,
        eps: float,
    ) -> None:
        if not len(emit):
            return
        d, slot, block = pool.data.shape[-1], emit[:, 0], emit[:, 1]
        before = ratio if ratio == 4 else 0
        at = block[:, None] * ratio + mx.arange(-before, ratio)
        kv, gate = mx.split(ring.data[slot[:, None], at % ring.size], 2, -1)
        gate = gate + mx.concatenate([w.ape.values] * (2 if before else 1))
        if before:  # the earlier block shows its first half of channels, the own block its second
            kv = mx.concatenate([kv[:, :before, :d], kv[:, before:, d:]], 1)
            gate = mx.concatenate([gate[:, :before, :d], gate[:, before:, d:]], 1)
        unseen = (at < 0)[:, :, None] & (block >= 0)[:, None, None]
        gate = mx.softmax(mx.where(unseen, NEVER, gate), 1)
        entry = (mx.where(unseen, 0, kv) * gate).sum(1)
        entry = self._rope(self.rms_norm(w.norm, entry, eps), block * ratio, freqs)
        pool.data[slot, mx.where(block < 0, pool.size, block)] = self._rounded(pool, entry)

    def _rounded(self, into: Rows, rows: mx.array) -> mx.array:
        if self.cache == "exact" or into.kind == "float":
            return rows
        return round_kv(rows, into.rotary) if into.kind == "kv" else round_index(rows)

    def index(
        self,
        q: mx.array,
        weights: mx.array,
        pool: Rows,
        step: Step,
        freqs: mx.array,
        ratio: int,
        k: int,
    ) -> mx.array:
        entries = min(step.span // ratio, pool.size)
        q = self._rounded(pool, self._rope(q, step.pos, freqs))
        one = pool.data.shape[0] == 1  # a single sequence: its keys need no copy for each token
        keys = pool.data[:, :entries] if one else pool.data[step.slot, :entries]
        products = mx.maximum(q @ keys.swapaxes(1, 2), 0)
        scores = (weights[:, None] @ products).squeeze(1)
        hidden = mx.arange(entries) >= ((step.pos + 1) // ratio)[:, None]
        scores = mx.where(hidden, NEVER, scores)
        ids = mx.argsort(-scores, -1)[:, :k]
        found = mx.take_along_axis(scores, ids, -1) != NEVER
        return mx.where(found, ids.astype(mx.int32), -1)

    def attention(
        self, w: Weights, c: Any, step: Step, q: mx.array, ids: mx.array | None, cfg: Config
    ) -> mx.array:
        ring, pool, ratio = c.window, c.pool, w.ratio
        q = self._rope(self.rms_norm(None, q, cfg.rms_norm_eps), step.pos, w.freqs)
        slot = step.slot[:, None]
        at = step.pos[:, None] - mx.arange(cfg.sliding_window)
        keys, seen = ring.data[slot, at % ring.size], at >= 0
        if pool is not None:
            if ids is None:
                entries = mx.arange(min(step.span // ratio, pool.size))
                ids = mx.where(entries < ((step.pos + 1) // ratio)[:, None], entries, -1)
            keys = mx.concatenate([keys, pool.data[slot, ids]], 1)  # -1 is the scratch row
            seen = mx.concatenate([seen, ids >= 0], 1)
        keys = mx.where(seen[:, :, None], keys, 0)  # what was never written may be NaN
        logits = (q @ keys.swapaxes(1, 2)) * q.shape[-1] ** -0.5
        logits = mx.where(seen[:, None], logits, NEVER)
        sinks = mx.broadcast_to(w.attn_sink[:, None], (*logits.shape[:2], 1))
        o = mx.softmax(mx.concatenate([logits, sinks], -1), -1)[..., :-1] @ keys
        return self._rope(o, step.pos, w.freqs, inverse=True)

    # output

    def take(self, x: mx.array, rows: mx.array) -> mx.array:
        return x[rows]

    def adjust(
        self, logits: mx.array, ids: mx.array, factor: mx.array, offset: mx.array
    ) -> mx.array:
        rows, vocab = mx.arange(len(logits))[:, None], logits.shape[1]
        padded = mx.pad(logits, [(0, 0), (0, 1)])  # one more column takes id -1
        at = mx.where(ids < 0, vocab, ids)
        old = padded[rows, at]
        padded[rows, at] = mx.where(old > 0, old / factor, old * factor) + offset
        return padded[:, :vocab]

    def sample(
        self,
        logits: mx.array,
        temperature: mx.array,
        top_k: mx.array,
        top_p: mx.array,
        min_p: mx.array,
        u: mx.array,
    ) -> mx.array:
        order = mx.argsort(-logits, -1)
        beyond = (top_k[:, None] > 0) & (mx.arange(logits.shape[-1]) >= top_k[:, None])
        ordered = mx.take_along_axis(logits, order, -1) / mx.maximum(temperature, 1e-6)[:, None]
        p = mx.softmax(mx.where(beyond, NEVER, ordered), -1)
        kept = (mx.cumsum(p, -1) - p < top_p[:, None]) & (p >= min_p[:, None] * p[:, :1])
        p = mx.where(kept, p, 0)
        running = mx.cumsum(p, -1)
        place = (running <= u[:, None] * running[:, -1:]).sum(-1, keepdims=True)
        place = mx.minimum(place, (p > 0).sum(-1, keepdims=True) - 1)
        place = mx.where(temperature[:, None] == 0, 0, place)
        return mx.take_along_axis(order, place, -1)[:, 0]


def _device(device: str) -> str:
    if device == "auto":
        return "gpu" if mx.metal.is_available() else "cpu"
    if device not in ("cpu", "gpu") or (device == "gpu" and not mx.metal.is_available()):
        raise BackendError(f"mlx has no device {device!r} here: use --device auto")
    return device


def _sinkhorn(comb: mx.array, n: int, rounds: int, eps: float) -> mx.array:
    """Normalise (T, n * n) matrices by column, then by row and column, `rounds` in all.

    A matrix product with zeros and ones adds up rows or columns in one operation where a sum, its
    broadcast and eps would take four.
    """
    columns, rows = _sums(n)
    floor = mx.full(comb.shape, eps)
    comb = comb / mx.addmm(floor, comb, columns)
    for _ in range(rounds - 1):
        comb = comb / mx.addmm(floor, comb, rows)
        comb = comb / mx.addmm(floor, comb, columns)
    return comb


@functools.cache
def _sums(n: int) -> tuple[mx.array, mx.array]:
    """(n * n, n * n) matrices that put a column's or a row's sum in each of its places."""
    ones, eye = np.ones((n, n), np.float32), np.eye(n, dtype=np.float32)
    return mx.array(np.kron(ones, eye)), mx.array(np.kron(eye, ones))


@functools.cache
def _thirds(n: int) -> mx.array:
    """Which of three scales each of n + n + n * n mixes has."""
    return mx.array([0] * n + [1] * n + [2] * n * n)


def _swiglu(gate: mx.array, up: mx.array, limit: float) -> mx.array:
    gate = mx.minimum(gate, limit)
    return gate * mx.sigmoid(gate) * mx.clip(up, -limit, limit)
