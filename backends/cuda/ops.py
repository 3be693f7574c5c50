"""The interface in PyTorch operations, on a GPU or on the CPU.

Activations are float32, with TF32 off, so that the result is the reference's.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ds4.backend import CacheMode, RowKind, StepFunction, Weights
from ds4.config import Config
from ds4.errors import BackendError
from ds4.quant.rows import RowFormat
from ds4.step import Step
from ds4.weights.tensor import HostTensor

from .attending import NEVER, Attending, Rows, largest
from .drafting import Drafting
from .heads import Summed
from .ranked import Ranked
from .ranks import join, own_device
from .saving import Saving
from .weights import Part, Weight, dense, dense_each, upload

Host = NDArray[Any]
EXPERTS_AT_ONCE = 8  # decoded to float32 together: at the real sizes 800 MB


class Cuda(Ranked, Attending, Saving, Drafting):
    name = "cuda"

    def __init__(self, device: str = "auto", cache: CacheMode = "native") -> None:
        self.device = _device(own_device(device))
        self.cache: CacheMode = cache
        self.ranks = join(self.device)
        self._hadamard: dict[int, Tensor] = {}
        self.placement: Any = None  # see placement/: here to check its rule on a CPU

    # memory

    def keep(self, name: str, tensor: HostTensor) -> Weight:
        try:
            w = upload(tensor, self.device)
            placed = self.placement is not None and ".experts." in name
            return self.placement.load(name, w) if placed else w
        except torch.OutOfMemoryError as error:
            raise BackendError(f"{name} does not fit in the memory of {self.device}") from error

    def numbered(self, weight: Weight, ids: Sequence[int], experts: int) -> Part:
        return Part(weight, tuple(ids))

    def alloc(self, kind: RowKind, slots: int, rows: int, width: int, rotary: int = 0) -> Rows:
        data = torch.zeros(slots, rows + 1, width, device=self.device)
        form = RowFormat("float" if self.cache == "exact" else kind, width, rotary)
        return Rows(kind, data, rotary, form)

    def upload(self, host: Host | Tensor) -> Tensor:
        return host if isinstance(host, Tensor) else torch.from_numpy(host).to(self.device)

    def download(self, x: Tensor) -> Host:
        return x.cpu().numpy()

    def capture(self, fn: StepFunction) -> StepFunction:
        run = lambda step: fn(step.on(self))  # noqa: E731
        return run if self.placement is None else self.placement.around(run)

    # dense

    def embed(self, w: Weight, tokens: Tensor, copies: int) -> Tensor:
        return dense(w[tokens])[:, None].repeat(1, copies, 1)

    def linear(self, w: Any, x: Tensor) -> Tensor:
        if isinstance(w, Summed):
            return self.ranks.all_sum(self.linear(w.weight, x))
        return F.linear(x, dense(w))

    def linears(self, ws: Sequence[Any], x: Tensor) -> list[Tensor]:
        return [self.linear(w, x) for w in ws]

    def grouped_linear(self, w: Weight, x: Tensor) -> Tensor:
        return torch.einsum("tgi,goi->tgo", x, dense(w))

    def rms_norm(self, w: Tensor | None, x: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], w, eps)

    def _rope(self, x: Tensor, pos: Tensor, freqs: Tensor, inverse: bool = False) -> Tensor:
        angle = pos[:, None] * freqs
        cos, sin = angle.cos(), (-angle if inverse else angle).sin()
        if x.ndim == 3:
            cos, sin = cos[:, None], sin[:, None]
        plain, tail = x.split([x.shape[-1] - 2 * len(freqs), 2 * len(freqs)], -1)
        a, b = tail[..., ::2], tail[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        return torch.cat([plain, turned], -1)

    # hyper-connections

    def hc_pre(self, w: Weights, norm: Tensor, h: Tensor, cfg: Config) -> tuple[Tensor, Any]:
        H, eps = cfg.hc_mult, cfg.hc_eps
        pre, post, comb = self._mixes(w, h, cfg).split([H, H, H * H], -1)
        base_pre, base_post, base_comb = w.base.split([H, H, H * H])
        pre = (pre * w.scale[0] + base_pre).sigmoid() + eps
        post = 2 * (post * w.scale[1] + base_post).sigmoid()
        comb = (comb * w.scale[2] + base_comb).unflatten(-1, (H, H)).softmax(-1) + eps
        comb = self._sinkhorn(comb.flatten(1), H, cfg.hc_sinkhorn_iters, eps).unflatten(-1, (H, H))
        x = (pre[:, :, None] * h).sum(1)
        return self.rms_norm(norm, x, cfg.rms_norm_eps), (post, comb)

    def _sinkhorn(self, comb: Tensor, n: int, rounds: int, eps: float) -> Tensor:
        """Normalise (T, n * n) matrices by column, then by row and column, `rounds` in all.

        A product with zeros and ones adds up rows or columns and eps in one operation.
        """
        ones, eye = torch.ones(n, n, device=self.device), torch.eye(n, device=self.device)
        columns, rows = torch.kron(ones, eye), torch.kron(eye, ones)
        floor = torch.full_like(comb, eps)
        comb = comb / torch.addmm(floor, comb, columns)
        for _ in range(rounds - 1):
            comb = comb / torch.addmm(floor, comb, rows)
            comb = comb / torch.addmm(floor, comb, columns)
        return comb

    def hc_post(self, x: Tensor, h: Tensor, mix: Any) -> Tensor:
        post, comb = mix
        return torch.baddbmm(post[:, :, None] * x[:, None], comb.mT, h)

    def hc_head(self, w: Weights, h: Tensor, cfg: Config) -> Tensor:
        pre = (self._mixes(w, h, cfg) * w.scale + w.base).sigmoid() + cfg.hc_eps
        return (pre[:, :, None] * h).sum(1)

    def _mixes(self, w: Weights, h: Tensor, cfg: Config) -> Tensor:
        return F.linear(self.rms_norm(None, h.flatten(1), cfg.rms_norm_eps), dense(w.fn))

    # feed-forward

    def _shared(self, w: Weights, x: Tensor, limit: float) -> Tensor:
        return _expert(dense(w.w1), dense(w.w3), dense(w.w2), x, limit)

    def route(self, w: Weights, x: Tensor, step: Step, cfg: Config) -> tuple[Tensor, Tensor]:
        scores = F.softplus(F.linear(x, dense(w.weight)), threshold=80).sqrt()
        if w.tid2eid is not None:
            ids = w.tid2eid[step.tokens].long()
        else:
            ids = largest(scores + w.bias, cfg.num_experts_per_tok)[1]
        weights = scores.gather(-1, ids)
        return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * cfg.routed_scaling_factor

    def experts(self, w: Weights, x: Tensor, ids: Tensor, weights: Tensor, limit: float) -> Tensor:
        e = w.experts
        if self.placement is not None:
            self.placement.chosen(e.w1, ids)
        order = ids.flatten().argsort(stable=True)  # by expert
        token, share = order // ids.shape[1], weights.flatten()[order, None]
        counts = ids.flatten().bincount().tolist()
        chosen = [i for i, count in enumerate(counts) if count]
        if isinstance(e.w1, Part):
            chosen = [i for i in chosen if i in e.w1.ids]
        out, rows = [x[:0]], [token[:0]]
        for start in range(0, len(chosen), EXPERTS_AT_ONCE):
            some = chosen[start : start + EXPERTS_AT_ONCE]
            each = zip(*(dense_each(matrix, some) for matrix in (e.w1, e.w3, e.w2)), strict=True)
            for i, (w1, w3, w2) in zip(some, each, strict=True):
                mine = slice(sum(counts[:i]), sum(counts[: i + 1]))
                rows.append(token[mine])
                out.append(_expert(w1, w3, w2, x[rows[-1]], limit, share[mine]))
        first = self.ranks.rank == 0  # which has the shared expert
        y = self._shared(w.shared_experts, x, limit) if first else torch.zeros_like(x)
        return self.ranks.all_sum(y.index_add_(0, torch.cat(rows), torch.cat(out)))

    # output

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        return x[rows]

    def gather(self, parts: Sequence[Tensor], rows: Tensor) -> Tensor:
        return torch.cat([*parts])[rows]

    def mask(self, logits: Tensor, allowed: Tensor) -> Tensor:
        return masked(logits, allowed)

    def adjust(self, logits: Tensor, ids: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
        row, place = (ids >= 0).nonzero(as_tuple=True)
        at = row, ids[row, place].long()
        old, f = logits[at], factor[row, place]
        new = torch.where(old > 0, old / f, old * f) + offset[row, place]
        return logits.index_put(at, new)

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        u: Tensor,
    ) -> Tensor:
        ordered, order = largest(logits, logits.shape[-1])
        rank = torch.arange(logits.shape[-1], device=self.device)
        beyond = (top_k[:, None] > 0) & (rank >= top_k[:, None])
        ordered = (ordered / temperature.clamp_min(1e-6)[:, None]).masked_fill(beyond, NEVER)
        p = ordered.softmax(-1)
        p = torch.where(
            (p.cumsum(-1) - p < top_p[:, None]) & (p >= min_p[:, None] * p[:, :1]), p, 0
        )
        running = p.cumsum(-1)
        place = (running <= u[:, None] * running[:, -1:]).sum(-1, keepdim=True)
        place = place.minimum((p > 0).sum(-1, keepdim=True) - 1)
        picked = order.gather(-1, place.masked_fill(temperature[:, None] == 0, 0))
        return picked[:, 0]


def masked(logits: Tensor, allowed: Tensor) -> Tensor:
    """(R, V) and int32 (R, ceil(V / 32)): -inf where a token's bit is 0."""
    bits = allowed[:, :, None] >> torch.arange(32, device=allowed.device, dtype=torch.int32) & 1
    return logits.masked_fill(bits.flatten(1)[:, : logits.shape[1]] == 0, NEVER)


def _device(device: str) -> str:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BackendError(
            f"torch {torch.__version__} has no device {device!r} here: use --device cpu"
        ) from error
    return device


def _expert(
    w1: Tensor, w3: Tensor, w2: Tensor, x: Tensor, limit: float, weight: Tensor | float = 1.0
) -> Tensor:
    gate, up = F.linear(x, w1).clamp(max=limit), F.linear(x, w3).clamp(-limit, limit)
    return F.linear(F.silu(gate) * up * weight, w2)
