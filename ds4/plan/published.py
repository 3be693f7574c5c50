"""How much of a Mac's bandwidth and arithmetic engines were seen to reach with this model.

From figures that others published for antirez/ds4 with its 2-bit weights, at 2,048 tokens of
context unless said: that engine is the fastest known on these chips. It reads 9.6 GB a token.
Nothing here was measured by this project; `python -m bench.mlx_speed` on a Mac measures.
"""

from dataclasses import dataclass

from .machines import Machine

READ = 9.6e9  # bytes a token, of that engine's 80.7 GiB
PREFILL = 27.0e9  # operations a token at such a length: sizes.prefill_flops


@dataclass(frozen=True)
class Published:
    chip: str
    decode: float  # tokens/s
    prefill: float | None
    bandwidth: float  # GB/s of the machine it was measured on
    tflops: float
    source: str

    @property
    def bandwidth_share(self) -> float:
        return self.decode * READ / (self.bandwidth * 1e9)

    @property
    def compute_share(self) -> float | None:
        return None if self.prefill is None else self.prefill * PREFILL / (self.tflops * 1e12)


FIGURES = (
    Published("m5max", 39.4, 790, 614, 44, "antirez/ds4 docs/PERFORMANCE.md, b4c5cc8"),
    Published("m4max", 26.8, 343.8, 546, 18.4, "Entrpi/ds4 speed-bench/m4_max.csv"),
    Published("m3max", 21.5, 250, 400, 16.4, "antirez/ds4 README, May 2026, at 11.7K"),
    Published("m3ultra", 44.1, 596, 819, 28.2, "antirez/ds4 issue 779"),
    Published("m2ultra", 23.2, 410.6, 800, 27.2, "Entrpi/ds4 speed-bench/m2_ultra.csv"),
)


@dataclass(frozen=True)
class Efficiency:
    """Shares of bandwidth and of arithmetic that an estimate assumes, and where they come from."""

    bandwidth: float
    compute: float
    source: str


ELSEWHERE = {"unified": 0.25, "gpu": 0.25, "cpu": 0.25}  # of arithmetic, by kind of machine


def efficiency(machine: Machine) -> Efficiency:
    """What an estimate for a machine assumes."""
    if machine.measured is not None:
        return machine.measured
    if machine.kind == "mac":
        return of_mac(machine)
    source = "between figures published for engines, whose share of bandwidth is 0.24 to 0.64"
    return Efficiency(0.5, ELSEWHERE[machine.kind], source)


def of_mac(machine: Machine) -> Efficiency:
    """Published for its chip; else the middle of what was published for others."""
    chip = machine.name.removeprefix("this machine (").partition("-")[0]
    known = next((one for one in FIGURES if one.chip == chip), None)
    if known and known.compute_share:
        source = f"{known.decode:g} tok/s and {known.prefill:g} in prefill on this chip"
        return Efficiency(known.bandwidth_share, known.compute_share, f"{source}: {known.source}")
    bandwidth = sorted(one.bandwidth_share for one in FIGURES)
    compute = sorted(one.compute_share for one in FIGURES if one.compute_share)
    middle = len(FIGURES) // 2
    source = f"the middle of figures published for {', '.join(one.chip for one in FIGURES)}"
    return Efficiency(bandwidth[middle], compute[middle], source)
