"""Kernels that start while the one before them in the stream ends."""

import torch
from torch import Tensor

# Tokens up to which that is done, at any number of which it was measured to help: 4 % at 1. What a
# kernel reads before it waits are weights and other constants only.
EARLY = 32


def starts_early(x: Tensor, tokens: int) -> bool:
    """Whether a launch for `tokens` tokens on x's device is a programmatic dependent one.

    Such a kernel must wait (gdc_wait) before it touches what others write.
    """
    if tokens > EARLY or not x.is_cuda:
        return False
    return torch.cuda.get_device_capability(x.device)[0] >= 9
