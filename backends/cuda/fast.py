"""The interface on an NVIDIA GPU: each operation is one kernel or a few (kernels/).

Steps of up to 32 tokens, decoding, are bound by reading weights and by the count of kernels; longer
ones, prefill, by arithmetic. What feeds a matrix is fp16 (activation.py); streams, sums, norms and
scores are float32. The streams of hyper-connections are taken further only where they are read: an
operation that ends a sublayer leaves its work to the one that begins the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds4.backend import CacheMode, Weights
from ds4.config import Config
from ds4.plan.memory import CHUNK, DECODED, SLACK
from ds4.step import Step

from .activation import SMALL, Activation
from .coming import Coming
from .fast_drafting import FastDrafting
from .fast_saving import FastSaving
from .feeding import Feeding
from .heads import Summed
from .keeping import Keeping
from .kernels import dense, gemv, gemv_staged, hyper, sample
from .kernels.attention import attention
from .kernels.draft import store_streams
from .kernels.draw import draw
from .kernels.index import index
from .kernels.norm import rms_norm
from .kernels.remember import Compressor, Norm, remember, write
from .ops import masked
from .pending import Embedded, Head, Mixed, rows_of
from .qmatrix import QMatrix
from .ranked import Ranked
from .ranks import join
from .rows import PackedRows


class Fast(Keeping, Ranked, Feeding, FastSaving, FastDrafting):
    name = "cuda"
    fused = True  # what operations return is read by its own operations only
    looks_ahead = True  # steps are queued on the device while the host goes on
    max_chunk = CHUNK
    slack = SLACK  # of a longer one rings keep no more open rows: remember.py pools from the step
    decode_sizes = DECODED  # of the steps that are recorded (graph.py)

    def __init__(self, device: str = "cuda", cache: CacheMode = "native") -> None:
        place = torch.device(device)
        self.device = f"cuda:{torch.cuda.current_device() if place.index is None else place.index}"
        self.cache: CacheMode = cache
        self._single = hyper.SMALL if cache == "exact" else hyper.SINGLE
        torch.cuda.set_device(self.device)
        self.ranks = join(self.device)
        self._remember: Callable[..., None] | None = None  # still to be launched
        self._branch = torch.cuda.Stream()
        self._halves = gemv_staged.Halves(self.device)
        self._apart: torch.cuda.Event | None = None  # the end of a mix that nothing waited for yet

    @property
    def compiles_ahead(self) -> bool:
        """Whether a step may be gone through without its kernels: no host code reads results."""
        return self.placement is None

    # dense

    def embed(self, w: Any, tokens: Tensor, copies: int) -> Embedded:
        return Embedded(w, tokens)

    def linear(self, w: QMatrix | Summed, x: Activation) -> Tensor:
        if isinstance(w, Summed):
            return self.ranks.all_sum(self.linear(w.weight, x))
        if w is self.head and self.logits is not None and len(x) <= len(self.logits):
            place, self.logits = self.logits.tensor_split([len(x)])
            return self._linears([w], x, [place])[0]
        return self.linears([w], x)[0]

    def linears(self, ws: Sequence[QMatrix], x: Activation) -> list[Tensor]:
        sizes = [w.rows for w in ws]
        return self._linears(
            ws, x, torch.empty(len(x), sum(sizes), device=self.device).split(sizes, -1)
        )

    def _linears(
        self, ws: Sequence[QMatrix], x: Activation, outs: Sequence[Tensor]
    ) -> list[Tensor]:
        if x.small:
            products = [gemv.Product(w, x.data, out) for w, out in zip(ws, outs, strict=True)]
            self._few(products, len(x))
        else:
            dense.linears(ws, x.data, outs)
        return list(outs)

    def _few(self, products: Sequence[gemv.Product], tokens: int) -> None:
        if not gemv_staged.linears(products, tokens, self._halves):
            gemv.linears(products, tokens)

    def grouped_linear(self, w: QMatrix, x: Activation) -> Activation:
        out = Activation.empty(len(x), w.rows, self.device)
        channels = x.data.shape[0] * 8 if x.small else x.data.shape[1]
        groups = channels // w.cols
        if x.small:
            inputs, outputs = x.data.chunk(groups), out.data.chunk(groups)
            products = [
                gemv.Product(w, inputs[g], outputs[g], g * w.rows // groups, w.rows // groups)
                for g in range(groups)
            ]
            self._few(products, len(x))
        else:
            dense.grouped(w, x.data, out.data, groups)
        return out

    def rms_norm(self, w: Tensor, x: Any, eps: float) -> Activation:
        if isinstance(x, Head):
            self._saw()
            return x.normed(w, eps, self.device)
        out = Activation.empty(len(x), x.shape[1], self.device)
        if self._remember and out.small:  # one launch for both
            self._remembered(Norm(x, w, out.data, out.strides))
        else:
            rms_norm(x, w, out.data, out.strides, eps)
        return out

    # hyper-connections

    def hc_pre(self, w: Weights, norm: Tensor, h: Any, cfg: Config) -> tuple[Activation, Any]:
        if isinstance(h, Embedded):
            streams, sums = hyper.embed_mix(*rows_of(h), w.fn, single=self._single)
        else:
            parts = {"y2": h.y2, "rows": h.rows, "single": self._single}
            streams, sums = hyper.post_mix(h.streams, h.y, h.mix, w.fn, **parts)
        x = Activation.empty(len(streams), streams.shape[2], self.device)
        eps, hc_eps, rounds = cfg.rms_norm_eps, cfg.hc_eps, cfg.hc_sinkhorn_iters
        given = w.scale, w.base, norm, x.data, x.strides
        if len(streams) == 1:
            width = streams.shape[2]
            mix, done = self._next_mix(sums, w, width, eps=eps, hc_eps=hc_eps, rounds=rounds)
            self._apart = done
            hyper.sublayer_input(streams, sums, *given, eps=eps, hc_eps=hc_eps)
            return x, (streams, mix, (done, sums))
        mix = hyper.finish(streams, sums, *given, eps=eps, hc_eps=hc_eps, rounds=rounds)
        return x, (streams, mix, None)

    def _next_mix(self, sums: Tensor, w: Weights, width: int, **numbers: Any) -> tuple[Any, Any]:
        """The mix, made in a branch of its own beside the sublayer; and the event of its end."""
        ready, done = torch.cuda.Event(), torch.cuda.Event()
        ready.record()
        with torch.cuda.stream(self._branch):
            self._branch.wait_event(ready)
            mix = hyper.next_mix(sums, w.scale, w.base, width, **numbers)
            done.record()
        return mix, done

    def hc_post(self, x: Any, h: Any, mix: Any) -> Mixed:
        streams, mix, branch = mix
        if branch is not None:  # `branch` keeps the sums until here
            torch.cuda.current_stream().wait_event(branch[0])
            self._apart = None
        y, y2 = x if isinstance(x, tuple) else (x, None)
        return Mixed(streams, y, mix, y2)

    def _saw(self) -> None:
        """Launch what a drafter's look at the step left, and join the branch of its mix, which
        nobody reads: a recording must not end with work apart."""
        self._remembered()
        if self._apart is not None:
            torch.cuda.current_stream().wait_event(self._apart)
            self._apart = None

    def hc_head(self, w: Weights, h: Mixed, cfg: Config) -> "Head":
        return Head(w, h, cfg, self._single)

    # attention and its caches

    def write(self, ring: PackedRows, rows: Tensor | Mixed, step: Step) -> None:
        if isinstance(rows, Mixed):
            store_streams(rows, ring, step.slot, step.pos)
            return
        write(ring, rows, step.slot, step.pos)

    def remember(
        self, w: Weights, c: Any, step: Step, kv: Tensor, projected: Sequence[Tensor], cfg: Config
    ) -> None:
        self._remembered()  # of a drafter's stage before
        indexer = w.indexer.compressor if w.indexer else None
        compressors = (w.compressor, c.rows, c.pool), (indexer, c.index_rows, c.index_pool)
        self._remember = partial(
            remember,
            kv,
            w.kv_norm,
            w.freqs,
            c.window,
            [
                Compressor(new, m.ape, m.norm, ring, pool)
                for (m, ring, pool), new in zip(compressors, projected, strict=False)
            ],
            step.slot,
            step.pos,
            step.emit.get(w.ratio),
            w.ratio,
            cfg.rms_norm_eps,
        )
        if len(kv) > SMALL:
            self._remembered()

    def _remembered(self, norm: Norm | None = None) -> None:
        """Launch what `remember` left to do, with the norm that comes after it."""
        if self._remember:
            self._remember(norm=norm)
            self._remember = None

    def index(
        self,
        q: Tensor,
        weights: Tensor,
        pool: PackedRows,
        step: Step,
        freqs: Tensor,
        ratio: int,
        k: int,
    ) -> Tensor:
        self._remembered()
        return index(q, weights, pool, step.slot, step.pos, step.span, freqs, ratio, k)

    def attention(
        self, w: Weights, c: Any, step: Step, q: Tensor, ids: Tensor | None, cfg: Config
    ) -> Activation:
        self._remembered()
        out = Activation.empty(len(q), q.shape[1] * q.shape[2], self.device)
        attention(
            q,
            w.freqs,
            w.attn_sink,
            step.slot,
            step.pos,
            ids,
            c.window.planes,
            c.pool.planes if c.pool else None,
            w.ratio,
            cfg.sliding_window,
            cfg.rms_norm_eps,
            out.data,
            *out.strides,
            span=step.span,
        )
        return out

    # output

    def take(self, x: Any, rows: Tensor) -> Any:
        if isinstance(x, Mixed):
            return replace(x, rows=rows)
        if isinstance(x, Head):
            return x.state()[rows]
        return x[rows]

    def gather(self, parts: Sequence[Tensor], rows: Tensor) -> Tensor:
        return torch.cat([*parts])[rows]

    def mask(self, logits: Tensor, allowed: Tensor) -> Tensor:
        return masked(logits, allowed)

    def adjust(self, logits: Tensor, ids: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
        return sample.adjust(logits, ids, factor, offset)

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        u: Tensor,
    ) -> Tensor:
        heat, most = (getattr(x, "host", None) for x in (temperature, top_k))
        if heat is not None and not heat.any():
            picked = sample.greedy(logits)
        else:
            unlimited = most is not None and not most.any()
            picked = draw(logits, temperature, None if unlimited else top_k, top_p, min_p, u)
        picked.coming = Coming(picked)  # type: ignore[attr-defined]
        return picked
