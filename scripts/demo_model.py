"""transformers' DeepSeek-V4 made fit to be trained quickly at the demo's size.

At this size a step of transformers' code is bound by the number of kernels. `prepare` swaps three
of its functions for equal ones with fewer kernels, keeps routing and hyper-connections in float32
under autocast, and adds what the language-model loss does not train: the indexer and the balance
between experts. `train_demo.py --smoke` checks that the model computes the same as before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

INDEX_ROWS = 4  # one in so many queries trains the indexer

_CSA = "compressed_sparse_attention"
_PRECISE = (hf.DeepseekV4HyperHead, hf.DeepseekV4TopKRouter, hf.DeepseekV4HashRouter)


# equal functions with fewer kernels


def sinkhorn(scores: Tensor, rounds: int, eps: float) -> Tensor:
    """(..., N, N) logits -> nearly doubly stochastic matrices, columns last (specification 3.3)."""
    mixed = torch.softmax(scores, -1) + eps
    mixed = mixed / (mixed.sum(-2, keepdim=True) + eps)
    for _ in range(rounds - 1):
        mixed = mixed / (mixed.sum(-1, keepdim=True) + eps)
        mixed = mixed / (mixed.sum(-2, keepdim=True) + eps)
    return mixed


def sink_softmax(scores: Tensor, mask: Tensor, sinks: Tensor, scale: float) -> Tensor:
    """Attention weights with a sink that only enlarges the denominator, in the scores' dtype."""
    x = scores.float() * scale + mask
    sink = sinks.float().view(1, -1, 1, 1)
    top = torch.maximum(x.amax(-1, keepdim=True), sink).detach()
    e = torch.exp(x - top)
    return (e / (e.sum(-1, keepdim=True) + torch.exp(sink - top))).to(scores.dtype)


def _or_eager(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A compiled function; the function itself from the first failure on."""
    torch._dynamo.config.recompile_limit = 64  # layer kinds x lengths x training or not
    chosen = [torch.compile(function, dynamic=False)]

    def call(*arguments: Any) -> Tensor:
        try:
            return chosen[0](*arguments)
        except Exception as error:
            if chosen[0] is function:
                raise
            print(f"not compiled: {function.__name__}: {type(error).__name__}", flush=True)
            chosen[0] = function
            return function(*arguments)

    return call


def _dense_experts(self: nn.Module, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Every expert for every token, in two products: faster here than sixteen gathers."""
    count, inner = self.num_experts, self.intermediate_dim
    routed = torch.zeros(len(x), count, dtype=weights.dtype, device=x.device)
    routed = routed.scatter_add(1, experts, weights)
    hidden = F.linear(x, self.gate_up_proj.flatten(0, 1)).unflatten(-1, (count, 2 * inner))
    hidden = self._apply_gate(hidden) * routed.unsqueeze(-1)
    return F.linear(hidden.flatten(1), self.down_proj.transpose(0, 1).flatten(1))


def _hyper_connection(self: nn.Module, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = self.hc_mult
    with torch.autocast(streams.device.type, enabled=False):
        flat = self.input_norm(streams.flatten(2).float())
        pre, post, mix = F.linear(flat, self.fn).split([n, n, n * n], -1)
        pre_base, post_base, mix_base = self.base.split([n, n, n * n])
        pre = torch.sigmoid(pre * self.scale[0] + pre_base) + self.hc_eps
        post = 2 * torch.sigmoid(post * self.scale[1] + post_base)
        scores = (mix * self.scale[2] + mix_base).unflatten(-1, (n, n))
        mixed = sinkhorn(scores, self.hc_sinkhorn_iters, self.hc_eps)
        collapsed = (pre.unsqueeze(-1) * streams).sum(2)
    return post, mixed, collapsed.to(streams.dtype)


def _in_float32(module: nn.Module) -> None:
    """Run a module outside autocast."""
    inner = module.forward

    def forward(x: Tensor, *rest: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return inner(x.float(), *rest)

    module.forward = forward


# attention, and what the indexer learns from it


class Attention:
    """Stands in for transformers' eager attention; notes what each indexer should have found.

    An indexer's target is the attention, summed over heads, that its layer would pay to each
    visible entry if it saw all of them (as DeepSeek-V3.2 trained its indexer).
    """

    def __init__(self, softmax: Callable[..., Tensor]) -> None:
        self.softmax = softmax
        self.collect = False
        self.losses: list[Tensor] = []
        self.scores: dict[nn.Module, Tensor] = {}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor,
        scaling: float, **_: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """query (B, H, S, D), one key head -> (B, S, H, D) and the weights."""
        b, h, s, d = query.shape
        kv = key[:, 0].to(query.dtype)
        scores = (query.reshape(b, h * s, d) @ kv.transpose(1, 2)).view(b, h, s, -1)
        weights = self.softmax(scores, mask, module.sinks, scaling)
        if self.collect and module.layer_type == _CSA:
            self._compare(module, scores.detach(), mask, scaling)
        out = (weights.reshape(b, h * s, -1) @ kv).view(b, h, s, d)
        return out.transpose(1, 2).contiguous(), weights

    def _compare(self, module: nn.Module, scores: Tensor, mask: Tensor, scaling: float) -> None:
        """Add the divergence of one indexer's scores from the attention of its layer."""
        queries = scores.shape[2]
        indexer = module.compressor.indexer
        # the last query of a block is the first that sees it
        rows = torch.arange(2 * indexer.compress_rate - 1, queries, INDEX_ROWS, device=mask.device)
        entries = torch.arange(scores.shape[-1] - queries, device=mask.device)
        hidden = entries >= ((rows + 1) // indexer.compress_rate).unsqueeze(-1)
        with torch.no_grad():
            x = scores[:, :, rows].float() * scaling
            window = x[..., :queries] + mask[:, :, rows, :queries]
            sink = module.sinks.view(1, -1, 1, 1).expand(*window.shape[:-1], 1)
            whole = torch.cat([window, x[..., queries:].masked_fill(hidden, -torch.inf), sink], -1)
            target = whole.softmax(-1)[..., queries:-1].sum(1)
            target = target / target.sum(-1, keepdim=True).clamp(min=1e-20)
        found = self.scores.pop(indexer)[:, rows].float().masked_fill(hidden, -torch.inf)
        log_found = found.log_softmax(-1).masked_fill(hidden, 0)
        divergence = torch.xlogy(target, target) - target * log_found
        self.losses.append(divergence.sum(-1).mean())

    def watch(self, indexer: nn.Module) -> None:
        """Note the scores of an indexer and let no gradient pass from it to the model."""

        def detach(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, residual, *rest = arguments
            return (hidden.detach(), residual.detach(), *rest)

        def note(_: nn.Module, __: Any, scores: Tensor) -> None:
            if self.collect:
                self.scores[indexer] = scores

        indexer.register_forward_pre_hook(detach)
        indexer.scorer.register_forward_hook(note)

    def take(self) -> Tensor:
        """The mean loss of the indexers since the last call."""
        losses, self.losses = self.losses, []
        return torch.stack(losses).mean()

    @contextmanager
    def installed(self) -> Iterator[None]:
        before, hf.eager_attention_forward = hf.eager_attention_forward, self
        try:
            yield
        finally:
            hf.eager_attention_forward = before


# balance between experts


class Balance:
    """Moves the bias of each score-routed expert against its load, without a loss."""

    def __init__(self, model: nn.Module, speed: float) -> None:
        self.speed = speed
        self.routers = [m for m in model.modules() if isinstance(m, hf.DeepseekV4TopKRouter)]
        self.loads = [torch.zeros_like(r.e_score_correction_bias) for r in self.routers]
        for router, load in zip(self.routers, self.loads, strict=True):
            router.register_forward_hook(self._counter(load))

    def _counter(self, load: Tensor) -> Callable[..., None]:
        def count(module: nn.Module, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            if module.training:
                chosen = output[2].flatten()
                load.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=load.dtype))

        return count

    @torch.no_grad()
    def step(self) -> None:
        for router, load in zip(self.routers, self.loads, strict=True):
            router.e_score_correction_bias += self.speed * torch.sign(load.mean() - load)
            load.zero_()


# all of it


def prepare(model: DeepseekV4ForCausalLM, dropout: float, compiled: bool) -> Attention:
    """Change a model in place for training; run it inside `installed()` of what this returns."""
    attention = Attention(_or_eager(sink_softmax) if compiled else sink_softmax)
    for module in model.modules():
        if isinstance(module, hf.DeepseekV4Experts):
            module.forward = MethodType(_dense_experts, module)
        elif isinstance(module, hf.DeepseekV4HyperConnection):
            module.forward = MethodType(_hyper_connection, module)
        elif isinstance(module, _PRECISE):
            _in_float32(module)
        elif isinstance(module, hf.DeepseekV4Indexer):
            attention.watch(module)
        if isinstance(module, hf.DeepseekV4Attention | hf.DeepseekV4SparseMoeBlock) and dropout:
            module.register_forward_hook(_dropping(dropout))
    return attention


def _dropping(share: float) -> Callable[..., Any]:
    def drop(module: nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], share, module.training), *output[1:])
        return F.dropout(output, share, module.training)

    return drop


def set_topk(model: nn.Module, count: int) -> None:
    """How many entries each indexer selects."""
    for module in model.modules():
        if isinstance(module, hf.DeepseekV4Indexer):
            module.index_topk = count
