"""The kernels of the fast path: one operation or one family of them a file."""

import os

# Products and sums fused, as every Triton up to 3.9 does unless told otherwise, and 3.10 will not.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
