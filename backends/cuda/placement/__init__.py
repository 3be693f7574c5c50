"""Experts that a GPU has no room for: some in its memory, all others in the host's.

The kernels read experts through addresses, so where one is can change between two of them. Up to 32
tokens (decoding), a kernel after the router finds which of the step's experts are not in GPU memory
and copies them into slots, the least wanted ones giving way (policy.py, place.cu): no host waits,
a CUDA graph holds it. Longer steps (prompts) leave the slots alone and stream the others through a
ring (stream.py). Between steps, experts that had no copy in host memory may get one (swap.py).
"""

from .placement import Placement, Report

__all__ = ["Placement", "Report"]
