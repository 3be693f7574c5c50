"""The kernels of a step compiled before it runs, all at once.

A step launches one kernel after the other, and each is compiled when it is first launched. In
`compile_only` launches compile in threads instead, and do nothing else.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton
from triton.runtime.jit import JITFunction

from . import nvrtc

MOST_THREADS = 16
_one_at_a_time = threading.Lock()


@contextmanager
def compile_only() -> Iterator[None]:
    """Kernels that this thread launches are compiled by the end, and not run; others' are run."""
    launch = JITFunction.run

    def run(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        here = nvrtc.compiling.get() is not None
        return launch(self, *args, warmup=warmup or here, **kwargs)

    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with _one_at_a_time, ThreadPoolExecutor(threads) as pool:
        compiling = nvrtc.compiling.set(pool)
        JITFunction.run = run
        try:
            # an error here would leave the mode on; the launch itself meets it again
            with triton.AsyncCompileMode(pool, ignore_errors=True):
                yield
        finally:
            JITFunction.run = launch
            nvrtc.compiling.reset(compiling)
