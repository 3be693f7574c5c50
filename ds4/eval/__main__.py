"""lm-evaluation-harness with ds4 among its models:

    python -m ds4.eval --model_args model=demo --tasks arc_easy

takes all options of `lm_eval`, whose --model is ds4 unless another is named. The harness finds no
models of other packages by itself. A task's data must be on this machine, or be had from the hub.
"""

import sys

from ..errors import Ds4Error


def main() -> None:
    """Run the harness's command line."""
    from lm_eval.__main__ import cli_evaluate

    from . import harness  # noqa: F401  # registers the model

    if not {"--model", "-M", "ls", "validate"} & set(sys.argv):
        sys.argv[1:] = ["run", "--model", "ds4", *sys.argv[1:]]
    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except Ds4Error as error:
        sys.exit(f"error: {error}")
