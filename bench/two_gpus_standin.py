"""The 5090x2 stand-in on two GPUs: each kept to 32 GB and reading misses over its own link.

    python -m bench.two_gpus_standin [--gpu-memory 32GB] [the options of bench.offload, per GPU]

The whole model, half of its experts on each rank; the same measurements as bench.offload.
"""

import faulthandler
import os
import sys

import torch

from ds4.parallel.launch import join

from . import offload
from .two_gpus import ENVIRONMENT

SHOW_AFTER_S = 125  # where every rank is


def main() -> None:
    faulthandler.dump_traceback_later(SHOW_AFTER_S)
    os.environ.update(ENVIRONMENT)
    given = ["--gpu-memory", "32GB", *sys.argv[1:]]
    offload._arguments(given)  # a mistake, or --help, ends here and not in every rank
    crew = join(2, [sys.executable, *sys.orig_argv[1:]])
    assert crew is not None
    torch.set_grad_enabled(False)
    if crew.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the whole process
        given += ["--out", ""]

    offload.Bench.machine, offload.Bench.cards = f"{crew.size} GPUs, each", crew.size
    offload.main(given)


if __name__ == "__main__":
    main()
