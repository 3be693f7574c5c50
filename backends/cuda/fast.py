"""The interface on an NVIDIA GPU: each operation is one kernel or a few (kernels/).

Steps of up to 32 tokens, decoding, are bound by reading weights and by the count of kernels; longer
ones, prefill, by arithmetic. What feeds a matrix is fp16 (activation.py); streams, sums, norms and
scores are float32. The streams of hyper-connections are taken further only where they are read: an
operation that ends a sublayer leaves its work to the one that begins the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ds4.backend import CacheMode, RowKind, StepFunction, Weights
from ds4.config import Config
from ds4.errors import BackendError
from ds4.ranks import Alone
from ds4.step import Step
from ds4.weights.tensor import HostTensor

from .activation import SMALL, Activation
from .coming import Coming
from .fast_drafting import FastDrafting, head_state
from .graph import Graphs
from .heads import Summed
from .kernels import gemm, gemv, hyper, moe_gemm, sample
from .kernels.attention import attention
from .kernels.draw import draw
from .kernels.index import index
from .kernels.norm import rms_norm
from .kernels.remember import Compressor, Norm, remember, write
from .kernels.router import Gate, Tiles, route_many, route_small
from .kernels.split import Split
from .ops import masked
from .qmatrix import QMatrix, load_matrix, renumbered
from .ranked import Ranked
from .ranks import join
from .rows import PackedRows, alloc
from .saving import Saving
from .weights import dense, pack

if TYPE_CHECKING:
    from ds4.plan.placement import Need

    from .placement import Placement

PLAIN = (
    "embed",
    "_fn",
    ".ape",
    ".tid2eid",
    ".freqs",
    ".markov_w1",
    ".confidence_head.proj",
)  # ends of names: not for matrix kernels
SORT_BLOCK = 128


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


class Fast(Ranked, Saving, FastDrafting):
    name = "cuda"
    fused = True  # what operations return is read by its own operations only
    looks_ahead = True  # steps are queued on the device while the host goes on
    max_chunk = 2048  # a longer one is little faster, and takes room in every slot
    decode_sizes = (1, 2, 4, 8, 16, 24, 32)  # of the steps that are recorded (graph.py)
    placement: "Placement | None" = None  # of experts that are not all on the GPU

    def __init__(self, device: str = "cuda", cache: CacheMode = "native") -> None:
        place = torch.device(device)
        self.device = f"cuda:{torch.cuda.current_device() if place.index is None else place.index}"
        self.cache: CacheMode = cache
        torch.cuda.set_device(self.device)
        self.ranks = join(self.device)
        self._remember: Callable[..., None] | None = None  # still to be launched

    @property
    def compiles_ahead(self) -> bool:
        """Whether a step may be gone through without its kernels: no host code reads results."""
        return self.placement is None and self.ranks.size == 1

    # memory

    def place(self, need: "Need", gpu_memory: int | None, heat_map: Path | None = None) -> None:
        """Before loading: if `gpu_memory` bytes do not hold it all, some experts go to the host."""
        from .placement.opening import open_placement

        self.placement = open_placement(need, self, gpu_memory, heat_map)
        if self.placement is not None:
            self.max_chunk = self.placement.budget.chunk

    def keep(self, name: str, tensor: HostTensor) -> Any:
        if len(tensor.shape) < 2 or name.endswith(PLAIN):
            w = pack(tensor, self.device)
            return dense(w) if name.endswith(PLAIN[1:3]) else w
        try:
            m = load_matrix(tensor, self.device, stacked=".experts." in name)
        except torch.OutOfMemoryError as error:
            raise BackendError(f"{name} does not fit in the memory of {self.device}") from error
        if not (gemv.fits(m) and gemm.fits(m)):
            raise BackendError(
                f"{name}: the GPU kernels cannot read {m.rows} x {m.cols}; use --device cpu"
            )
        if self.placement is not None and ".experts." in name and name.startswith("layers."):
            placed: QMatrix = self.placement.load(name, m)
            return placed
        return m

    def numbered(self, weight: QMatrix, ids: Sequence[int], experts: int) -> QMatrix:
        return weight if weight.tier is not None else renumbered(weight, ids, experts)

    def alloc(
        self, kind: RowKind, slots: int, rows: int, width: int, rotary: int = 0
    ) -> PackedRows:
        return alloc(kind, slots, rows, width, rotary, self.cache, self.device)

    def upload(self, host: NDArray[Any] | Tensor) -> Tensor:
        if isinstance(host, Tensor):
            return host
        x = torch.from_numpy(host).to(self.device, non_blocking=True)  # else all work is waited for
        x.host = host  # type: ignore[attr-defined]  # known without waiting: see `sample`
        return x

    def download(self, x: Any) -> NDArray[Any]:
        if (coming := getattr(x, "coming", None)) is not None:
            return coming.wait()
        host: NDArray[Any] = (x.ids if isinstance(x, Chosen | Asked) else x).cpu().numpy()
        return host

    def capture(self, fn: StepFunction) -> StepFunction:
        run: StepFunction = lambda step: fn(step.on(self))  # noqa: E731
        if isinstance(self.ranks, Alone) or self.ranks.recordable:
            run = Graphs(fn, self)
        return run if self.placement is None else self.placement.around(run)

    # dense

    def embed(self, w: Any, tokens: Tensor, copies: int) -> Embedded:
        return Embedded(w, tokens)

    def linear(self, w: QMatrix | Summed, x: Activation) -> Tensor:
        if isinstance(w, Summed):
            return self.ranks.all_sum(self.linear(w.weight, x))
        return self.linears([w], x)[0]

    def linears(self, ws: Sequence[QMatrix], x: Activation) -> list[Tensor]:
        sizes = [w.rows for w in ws]
        outs = torch.empty(len(x), sum(sizes), device=self.device).split(sizes, -1)
        if x.small:
            products = [gemv.Product(w, x.data, out) for w, out in zip(ws, outs, strict=True)]
            gemv.linears(products, len(x))
        else:
            gemm.linears(ws, x.data, outs)
        return list(outs)

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
            gemv.linears(products, len(x))
        else:
            ordered = gemm.permute(x.data, w)
            gemm.linear(w, ordered, out.data, groups)
        return out

    def rms_norm(self, w: Tensor, x: Any, eps: float) -> Activation:
        if isinstance(x, Head):
            self._remembered()  # what a drafter saw
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
            streams, sums = hyper.embed_mix(*_rows_of(h), w.fn)
        else:
            streams, sums = hyper.post_mix(h.streams, h.y, h.mix, w.fn, y2=h.y2, rows=h.rows)
        x = Activation.empty(len(streams), streams.shape[2], self.device)
        mix = hyper.finish(
            streams,
            sums,
            w.scale,
            w.base,
            norm,
            x.data,
            x.strides,
            eps=cfg.rms_norm_eps,
            hc_eps=cfg.hc_eps,
            rounds=cfg.hc_sinkhorn_iters,
        )
        return x, (streams, mix)

    def hc_post(self, x: Any, h: Any, mix: Any) -> Mixed:
        streams, mix = mix
        y, y2 = x if isinstance(x, tuple) else (x, None)
        return Mixed(streams, y, mix, y2)

    def hc_head(self, w: Weights, h: Mixed, cfg: Config) -> "Head":
        return Head(w, h, cfg)

    # feed-forward

    def route(self, w: Weights, x: Activation, step: Step, cfg: Config) -> tuple[Any, Any]:
        gate = Gate(
            w.bias,
            w.tid2eid,
            w.weight.rows,
            cfg.num_experts_per_tok,
            cfg.routed_scaling_factor,
            w.held,
        )
        if x.small:
            return Asked(w.weight, gate, x, step), None
        z = self.linear(w.weight, x)
        ids, weights, plan = route_many(gate, z, step.tokens, SORT_BLOCK, pos=step.pos)
        routed = gemm.Routed(plan.pairs, plan.offsets, weights, gate.picks)
        return Chosen(ids, routed), weights

    def experts(self, w: Weights, x: Activation, ids: Any, weights: Any, limit: float) -> Any:
        if isinstance(ids, Asked):
            return self._few_tokens(w, x, ids, limit)
        e, s = w.experts, w.shared_experts
        routed, shared = (e.w1, e.w3, e.w2), (s.w1, s.w3, s.w2)
        out = torch.empty(len(x), e.w2.rows, device=self.device)
        ranks, split = self.ranks, None
        if w.gate.held is not None:
            split = Split(w.gate.held, ids.ids, ranks.rank == 0, ranks.size)
        if self.placement is not None and e.w1.tier is not None:
            self.placement.prompt(routed, shared, x.data, ids.order, limit, out, split)
        else:
            moe_gemm.experts(routed, shared, x.data, ids.order, limit, out, split)
        return ranks.all_sum(out)

    def _few_tokens(self, w: Weights, x: Activation, asked: Asked, limit: float) -> Any:
        """The experts of a small step, in parts if they are all here: `hc_post` adds them."""
        e, s, ranks, held = w.experts, w.shared_experts, self.ranks, w.gate.held
        first = held is None or ranks.rank == 0
        todo = gemv.Experts(
            (e.w1, e.w3, e.w2),
            (s.w1, s.w3, s.w2),
            x.data,
            (len(x), asked.gate.picks),
            limit,
            1 if held is None else ranks.size,
            first,
        )
        product = asked.product()
        todo.begin(product)
        ids, weights, tiles = asked.answer(product)
        if self.placement is not None and e.w1.tier is not None:
            self.placement.fetch(e.w1.tier, tiles)
        of_chosen, of_shared = todo.finish(tiles, weights)
        if held is None:
            return of_chosen, of_shared
        out = torch.empty(len(x), e.w2.rows, device=self.device)
        base = of_shared if first else None
        Split(held, ids, first, ranks.size).add_up(of_chosen.flatten(0, 1), base, out)
        return ranks.all_sum(out)

    # attention and its caches

    def write(self, ring: PackedRows, rows: Tensor, step: Step) -> None:
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
            return head_state(x.w, x.h, x.cfg)[rows]
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


@dataclass(frozen=True)
class Head:
    """The streams of the wanted tokens, still to be weighed into one and normed."""

    w: Weights
    h: Mixed
    cfg: Config

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
        )
        return x


def _rows_of(h: Embedded) -> tuple[Tensor, Tensor]:
    """A table of plain values and the rows of it that are wanted."""
    if isinstance(h.table, Tensor):
        return h.table, h.tokens
    every = torch.arange(len(h.tokens), dtype=torch.int32, device=h.tokens.device)
    return dense(h.table[h.tokens]), every
