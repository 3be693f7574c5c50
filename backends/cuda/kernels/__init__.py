"""The kernels of the fast path: one operation or one family of them a file."""
