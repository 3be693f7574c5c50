"""Where ranks share the experts: a token's sum over those that are here."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@dataclass(frozen=True)
class Split:
    """A rank's part of a layer's experts."""

    held: Tensor  # (experts,) int32: 1 for those that are here
    ids: Tensor  # (T, K) int32: the chosen ones
    first: bool  # whether this rank has the shared expert
    size: int  # ranks in all

    def add_up(self, each: Tensor, base: Tensor | None, out: Tensor) -> None:
        """out (T, D) = `base` (T, D), else 0, + the rows of each token of `each` (T * K, D).

        In the order of the picks. Rows of experts elsewhere are not read: nobody wrote them.
        """
        (tokens, width), picks = out.shape, self.ids.shape[1]
        add_held[(tokens, triton.cdiv(width, BLOCK))](
            each, self.ids, self.held, out if base is None else base, out, width,
            K=picks, BASE=base is not None, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


@triton.jit
def add_held(
    each, ids, held, base, out, D, K: tl.constexpr, BASE: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = d < D
    total = tl.load(base + token * D + d, ok, 0.0) if BASE else tl.zeros((BLOCK,), tl.float32)
    for pick in tl.static_range(K):
        here = tl.load(held + tl.load(ids + token * K + pick)) != 0
        read = d < tl.where(here, D, 0)
        total += tl.load(each + (token * K + pick) * D + d, read, 0.0)
    tl.store(out + token * D + d, total, ok)
