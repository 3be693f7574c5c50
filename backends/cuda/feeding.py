"""The feed-forward half of a layer: the router, the chosen experts and the shared one."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ds4.backend import Weights
from ds4.config import Config
from ds4.ranks import Alone
from ds4.step import Step

from .activation import Activation
from .kernels import gemm, gemv, moe_gemm
from .kernels.router import Gate, route_many
from .kernels.split import Split
from .pending import Asked, Chosen
from .qmatrix import QMatrix
from .ranks import Group

if TYPE_CHECKING:
    from .placement import Placement

SORT_BLOCK = 128


class Feeding:
    """The experts of Fast: of a small step by gemv.cu, of a long one by gemm.cu."""

    device: str
    ranks: Group | Alone
    placement: "Placement | None"

    if TYPE_CHECKING:  # what the rest of Fast has, in whichever order its parts are named

        def linear(self, w: QMatrix, x: Activation) -> Tensor:
            """float32 (T, rows)."""

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
        first, placed = held is None or ranks.rank == 0, e.w1.tier is not None
        todo = gemv.Experts(
            (e.w1, e.w3, e.w2),
            (s.w1, s.w3, s.w2),
            x.data,
            (len(x), asked.gate.picks),
            limit,
            1 if held is None else ranks.size,
            first,
            placed,
        )
        product = asked.product()
        todo.begin(product)
        ids, weights, tiles = asked.answer(product)
        copies = None
        if self.placement is not None and placed:
            copies = self.placement.fetch(e.w1.tier, tiles)
        of_chosen, of_shared = todo.finish(tiles, weights, copies)
        if held is None:
            return of_chosen, of_shared
        out = torch.empty(len(x), e.w2.rows, device=self.device)
        base = of_shared if first else None
        Split(held, ids, first, ranks.size).add_up(of_chosen.flatten(0, 1), base, out)
        return ranks.all_sum(out)
