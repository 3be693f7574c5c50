"""lm-evaluation-harness with ds4 among its models:

    python -m ds4.eval --model_args model=demo --tasks arc_easy

takes all options of `lm_eval`, whose --model is ds4 unless another is named. The harness finds no
models of other packages by itself. A task's data must be on this machine, or be had from the hub.
"""

import sys

from ..errors import Ds4Error

if __name__ == "__main__":
    try:
        from .harness import main

        main()
    except Ds4Error as error:
        sys.exit(f"error: {error}")
