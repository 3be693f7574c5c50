"""Many random request bodies against the whole application: no 5xx, no hang.

python -m bench.fuzz_server [BODIES] [SEED]     prints counts by status, and the first failure
"""

import sys
import time
from collections import Counter

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzzing import Target, bodies


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    number = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    target, statuses, start = Target(), Counter[int](), time.perf_counter()

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(body=bodies())
    def run(body: tuple[str, bytes]) -> None:
        statuses[target.check(*body)] += 1

    try:
        run()
    finally:
        seconds = time.perf_counter() - start
        print(f"{sum(statuses.values())} bodies in {seconds:.0f} s: {dict(statuses)}")
        target.close()


if __name__ == "__main__":
    main()
