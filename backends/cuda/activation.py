"""fp16 activations that feed a matrix, in the layout that its kernels read.

Of up to SMALL tokens a panel (K / 8, N, 8), N >= T, which gemv.cu reads; of more, rows (T, K).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import gemv

SMALL = gemv.MOST_TOKENS


@dataclass(frozen=True)
class Activation:
    data: Tensor
    tokens: int

    @classmethod
    def empty(cls, tokens: int, channels: int, device: str | torch.device) -> "Activation":
        if tokens <= SMALL:
            return cls(gemv.panel(channels, tokens, device), tokens)
        data = torch.empty(tokens, channels, dtype=torch.float16, device=device)
        return cls(data, tokens)

    @property
    def small(self) -> bool:
        return self.tokens <= SMALL

    @property
    def strides(self) -> tuple[int, int]:
        """Channel k of token t is at k // 8 * first + t * second + k % 8."""
        return (self.data.stride(0), 8) if self.small else (8, self.data.stride(0))

    def __len__(self) -> int:
        return self.tokens

    def reshape(self, *shape: int) -> "Activation":
        """The same: groups of channels are told from the matrix that reads them."""
        return self
