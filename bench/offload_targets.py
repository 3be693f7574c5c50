"""What bench.offload's figures are held against: targets, a peer, and the plan's estimate."""

from dataclasses import replace

from ds4.config import Config
from ds4.plan.estimate import Fit, fit
from ds4.plan.machines import GIB, adjusted, named
from ds4.quant.recipes import RECIPES

# llama.cpp, MXFP4, experts of 28 of 43 layers on the CPU of the same kind of host
PEER = {"decode": 11.0, "prefill": 477.0}
TARGETS = {
    ("native", 256, "uniform", 1): 20,
    ("native", 256, "skewed", 1): 40,
    ("q2", 256, "uniform", 1): 48,
    ("q2", 256, "skewed", 1): 75,
    ("q2", 256, "skewed", 8): 120,
    ("native", 160, "skewed", 1): 60,
}
PREFILL_TARGET = {("native", 256): 3500}


def expected(
    cfg: Config, recipe: str, context: int, gpu_bytes: int, host_bytes: int, cards: int = 1
) -> Fit:
    """What `ds4 plan` expects of H100s and a host of which so many bytes may be used.

    `gpu_bytes` are each card's, and each has a link of its own.
    """
    machine = named(f"{cards}xh100")
    machine = replace(machine, link=cards * machine.link)
    kept = machine.ram - machine.host_limit / GIB  # by the system
    machine = adjusted(machine, gpu_bytes / GIB, host_bytes / GIB + kept, None)
    return fit(cfg, machine, RECIPES["q8_0" if recipe == "native" else recipe], context)
