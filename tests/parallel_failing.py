"""Ranks that run the same program and fail: see tests/test_parallel.py.

python -m tests.parallel_failing 0|1|both|none
"""

import sys
import time

from ds4.parallel.launch import join


def main(who: str) -> None:
    crew = join(2, [sys.executable, "-m", "tests.parallel_failing", who])
    assert crew is not None
    if who in ("both", str(crew.rank)):
        raise RuntimeError("out of memory")
    if who != "none":
        time.sleep(600)  # as in a sum that the other rank never joins


if __name__ == "__main__":
    main(sys.argv[1])
