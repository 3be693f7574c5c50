"""The interface in MLX operations, with Metal on a Mac and on the CPU elsewhere.

Activations are float32. A cache is one mx.array under one name, replaced by each write: MLX then
updates the memory in place. What one step has in common is worked out once, in facts.py.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ds4.backend import CacheMode, RowKind, RowRange, StepFunction, Weights
from ds4.config import Config
from ds4.errors import BackendError
from ds4.ranks import share
from ds4.step import Step
from ds4.weights.tensor import HostTensor

from . import compress, experts, hyper, kernels
from .attention import attend, row_numbers
from .choosing import Choosing
from .drafting import Drafting
from .facts import Facts, Run, rotate
from .index import choose
from .kernels.gate import verdicts
from .memory import set_limits, usable
from .ranks import held, join
from .rows import Rows, copy_rows, export_rows, restore_rows, rounded, row
from .weights import Matrix, Weight, groups, joined, upload

Host = NDArray[Any]
FEW = 16  # tokens up to which kernels made for decoding serve


class Mlx(Choosing, Drafting):
    name = "mlx"
    looks_ahead = True  # a step may begin with a token that the host has not seen

    def __init__(self, device: str = "auto", cache: CacheMode = "native") -> None:
        self.device = _device(device)
        self.cache: CacheMode = cache
        mx.set_default_device(mx.Device(mx.DeviceType.gpu if self.device == "gpu" else mx.cpu))
        if self.device == "gpu":
            set_limits()
        self._frequencies: dict[bytes, Weight] = {}
        self._built = 0  # sublayers; on a GPU each start is a command buffer, so there are fewer
        self._started_every = 16 if self.device == "gpu" else 1
        self.ranks = join()
        self._mine = range(0)  # the experts of this rank
        self._last: tuple[mx.array, Facts] | None = None
        # On a GPU sorted products pay from 4 rows an expert: 171 tokens; 1,024 give 24 rows.
        self.max_chunk = 1024 if self.device == "gpu" else 256
        self.verdicts = verdicts() if self.device == "gpu" else ()
        off = {one.name for one in self.verdicts if not one.used}
        self.kernels = frozenset(one.name for one in self.verdicts) - off

    def _pick(self, name: str, serves: bool, twin: Any) -> Any:
        """The Metal kernel of that name where it is on and serves, else its twin."""
        return kernels.NAMES[name] if serves and name in self.kernels else twin

    # memory

    def free_memory(self) -> int | None:
        """Bytes that the GPU may use; None on a CPU."""
        return usable() - mx.get_active_memory() if self.device == "gpu" else None

    def load(self, name: str, tensor: HostTensor) -> Weight:
        if self.ranks.size > 1 and ".experts." in name:
            self._mine = share(len(tensor.data), self.ranks)
            tensor = tensor.map(lambda x: x[self._mine.start : self._mine.stop])
        weight = upload(tensor, self.device)
        if name.endswith("freqs"):  # equal ones become one: steps keep rotations by identity
            return self._frequencies.setdefault(tensor.data.tobytes(), weight)
        return weight

    def alloc(self, kind: RowKind, slots: int, rows: int, width: int, rotary: int = 0) -> Rows:
        return Rows.zeros(kind, self.cache, slots, rows, width, rotary)

    def upload(self, host: Host | mx.array) -> mx.array:
        return host if isinstance(host, mx.array) else mx.array(host)

    def download(self, x: mx.array) -> Host:
        return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)

    def save(self, slot: int, ranges: Sequence[RowRange]) -> Host:
        return export_rows(slot, ranges)

    def restore(self, slot: int, ranges: Sequence[RowRange], data: Host) -> None:
        restore_rows(slot, ranges, data)

    def copy(self, source: int, target: int, ranges: Sequence[RowRange]) -> None:
        copy_rows(source, target, ranges)

    def capture(self, fn: StepFunction) -> StepFunction:
        return lambda step: fn(step.on(self))

    def _facts(self, step: Step) -> Facts:
        if self._last is None or self._last[0] is not step.pos:
            self._last = step.pos, Facts(step, self.cache == "exact")
        return self._last[1]

    # dense

    def embed(self, w: Matrix, tokens: mx.array, copies: int) -> mx.array:
        return mx.repeat(w.rows(tokens)[:, None], copies, 1)

    def linear(self, w: Matrix, x: mx.array) -> mx.array:
        return self._product(w, x)

    def _product(self, w: Matrix, x: mx.array) -> mx.array:
        serves = len(x) <= FEW and kernels.experts.multiplies(w)
        product: mx.array = self._pick("matvec", serves, experts.product)(x, w)
        return product

    def linears(self, ws: Sequence[Matrix], x: mx.array) -> list[mx.array]:
        out: dict[int, mx.array] = {}
        for group in groups(ws):
            parts = [ws[i] for i in group]
            y = self._product(joined(*parts), x)
            ends = np.cumsum([part.rows_out for part in parts])[:-1].tolist()
            out |= zip(group, mx.split(y, ends, -1) if ends else [y], strict=True)
        return [out[i] for i in range(len(ws))]

    def grouped_linear(self, w: Matrix, x: mx.array) -> mx.array:
        return w.matmul(x.swapaxes(0, 1)).swapaxes(0, 1)

    def rms_norm(self, w: mx.array | None, x: mx.array, eps: float) -> mx.array:
        return mx.fast.rms_norm(x, w, eps)

    # hyper-connections

    def hc_pre(self, w: Weights, norm: mx.array, h: mx.array, cfg: Config) -> tuple[mx.array, Any]:
        mix = self._pick("hc_mix", kernels.hyper.serves(cfg), hyper.mix)
        x, post, comb = mix(w, norm, h, w.fn.matmul(h.flatten(1)), cfg)
        return x, (post, comb)

    def hc_post(self, x: mx.array, h: mx.array, mix: Any) -> mx.array:
        serves = h.shape[1] == 4 and h.shape[2] % kernels.hyper.THREADS == 0
        streams = self._pick("hc_spread", serves, hyper.spread)(x, h, *mix)
        self._built += 1
        if self._built % self._started_every == 0:
            mx.async_eval(streams)  # it computes while Python builds what follows
        return streams

    def hc_head(self, w: Weights, h: mx.array, cfg: Config) -> mx.array:
        return hyper.head(w, h, cfg)

    # feed-forward

    def route(self, w: Weights, x: mx.array, step: Step, cfg: Config) -> tuple[mx.array, mx.array]:
        logits = self._product(w.weight, x)
        k, factor = cfg.num_experts_per_tok, cfg.routed_scaling_factor
        if w.tid2eid is not None:
            return experts.listed(logits, w.tid2eid[step.tokens], factor)
        serves = kernels.experts.routes(logits.shape[1], k)
        picked: tuple[mx.array, mx.array]
        picked = self._pick("route", serves, experts.biased)(logits, w.bias, k, factor)
        return picked

    def experts(
        self, w: Weights, x: mx.array, ids: mx.array, weights: mx.array, limit: float
    ) -> mx.array:
        s = w.shared_experts
        shared = s.w2.matmul(experts.swiglu(experts.gate_up(s).matmul(x), limit))
        if self.ranks.size == 1:
            return self._routed(w.experts, x, ids, weights, limit, shared)
        ids, weights = held(ids, weights, self._mine)
        mine = self._routed(w.experts, x, ids, weights, limit, mx.zeros_like(shared))
        return shared + self.ranks.all_sum(mine)

    def _routed(
        self,
        w: Weights,
        x: mx.array,
        ids: mx.array,
        weights: mx.array,
        limit: float,
        base: mx.array,
    ) -> mx.array:
        """`base` (T, D) and the weighted sum of the chosen experts."""
        stack = experts.gate_up(w)
        if ids.size >= experts.SORTED_FROM:
            return experts.many(w, x, ids, weights, limit, base)
        gated = self._pick("gate_up", kernels.experts.gates(stack), experts.gated)
        return experts.few(w, gated(x, stack, ids, limit), ids, weights, base)

    # attention and its caches

    def write(self, ring: Rows, rows: mx.array, step: Step) -> None:
        facts = self._facts(step)
        rows = rounded(rows, ring.rotary, ring.form)
        ring.store(facts.slot, facts.ring_rows(ring.size), rows)

    def remember(
        self,
        w: Weights,
        c: Any,
        step: Step,
        kv: mx.array,
        projected: Sequence[mx.array],
        cfg: Config,
    ) -> None:
        facts = self._facts(step)
        serves = kernels.rows.serves(cfg.head_dim, cfg.qk_rope_head_dim)
        turn, eps = facts.rotation(w.freqs), cfg.rms_norm_eps
        kv = self._pick("row", serves, row)(kv, w.kv_norm, turn, eps, c.window.form)
        c.window.store(facts.slot, facts.ring_rows(c.window.size), kv)
        indexer = w.indexer.compressor if w.indexer else None
        compressors = (w.compressor, c.rows, c.pool), (indexer, c.index_rows, c.index_pool)
        for (m, ring, pool), rows in zip(compressors, projected, strict=False):
            self.write(ring, rows, step)
            serves = kernels.rows.serves(pool.data.shape[-1], cfg.qk_rope_head_dim)
            make = self._pick("entry", serves, compress.entry)
            compress.finish(make, m, ring, pool, facts, w.freqs, w.ratio, eps)

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
        facts, width = self._facts(step), min(k, step.span // ratio, pool.size)
        turn, serves = facts.rotation(freqs), kernels.rows.serves(q.shape[-1], 2 * freqs.size)
        q = self._pick("row", serves, row)(q, None, turn, 0.0, pool.form)
        return facts.by_run(
            lambda run, rows: choose(q[rows], weights[rows], pool, run, ratio, width),
            lambda rows: mx.full((rows, width), -1, mx.int32),
        )

    def attention(
        self, w: Weights, c: Any, step: Step, q: mx.array, ids: mx.array | None, cfg: Config
    ) -> mx.array:
        facts, eps = self._facts(step), cfg.rms_norm_eps
        serves = kernels.attention.serves(cfg.head_dim, cfg.qk_rope_head_dim)
        if "attend" in self.kernels and serves and len(q) <= FEW:
            near, far = row_numbers(facts, c, cfg.sliding_window, w.ratio, ids)
            pool = c.window if c.pool is None else c.pool
            turn, rows = facts.rotation(w.freqs), [r.data.flatten(0, 1) for r in (c.window, pool)]
            seen = rows[0], near, rows[1], far
            o: mx.array = kernels.NAMES["attend"](q, w.attn_sink, turn, *seen, eps)
            return o

        def of_run(run: Run, rows: slice) -> mx.array:
            picked = None if ids is None else ids[rows]
            layout = c.window, cfg.sliding_window, c.pool, w.ratio
            return attend(q[rows], w.attn_sink, run, *layout, picked)

        q = self.rms_norm(None, q, eps)
        q = rotate(q, facts.rotation(w.freqs)) * cfg.head_dim**-0.5
        o = facts.by_run(of_run, lambda rows: mx.zeros((rows, *q.shape[1:])))
        return rotate(o, facts.rotation(w.freqs, inverse=True))

    # output

    def take(self, x: mx.array, rows: mx.array) -> mx.array:
        return x[rows]

    def gather(self, parts: Sequence[mx.array], rows: mx.array) -> mx.array:
        return mx.concatenate(list(parts))[rows]


def _device(device: str) -> str:
    if device == "auto":
        return "gpu" if mx.metal.is_available() else "cpu"
    if device not in ("cpu", "gpu") or (device == "gpu" and not mx.metal.is_available()):
        raise BackendError(f"mlx has no device {device!r} here: use --device auto")
    return device
