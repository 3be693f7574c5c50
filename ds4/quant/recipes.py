"""Recipes: which number format each class of weights gets, under the names that users know.

Routed experts are shipped as MXFP4, so recipes of four bits and more keep them bit for bit and
differ in the other matrices only. Of a drafter, experts are made like the model's, and are nearly
all of it; the rest stays as shipped. Norms, hyper-connections, sinks, position biases, routers and
routing tables stay as shipped in every recipe.
"""

import re
from dataclasses import dataclass, replace

GROUPS = (128, 64, 32)  # what an affine row may be cut into
_SCALE_AND_BIAS = 32  # bits a group: two bf16 numbers


@dataclass(frozen=True)
class Format:
    """How a matrix is stored; `group` inputs of a row share their scale (0: there is none).

    mode   "mxfp4", "mxfp8" (one E8M0 byte a group), "affine" (bf16 scale and bias a group),
           "bf16" or "f32"
    """

    mode: str
    bits: int
    group: int

    @property
    def bits_per_weight(self) -> float:
        """Bits that one weight takes, its share of scales and biases included."""
        if not self.group:
            return self.bits
        return self.bits + (_SCALE_AND_BIAS if self.mode == "affine" else 8) / self.group

    def fitting(self, columns: int) -> "Format | None":
        """This format with the largest group that divides a row; None if there is none."""
        if not self.group or columns % self.group == 0:
            return self
        smaller = (g for g in GROUPS if g < self.group and columns % g == 0)
        group = next(smaller, None) if self.mode == "affine" else None
        return None if group is None else replace(self, group=group)


def affine(bits: int, group: int = 64) -> Format:
    """Codes of so many bits, times a scale, plus a bias."""
    return Format("affine", bits, group)


MXFP4 = Format("mxfp4", 4, 32)
MXFP8 = Format("mxfp8", 8, 32)
BF16 = Format("bf16", 16, 0)

_CLASSES = {
    "gate_up": r"(layers|mtp)\.\d+\.ffn\.experts\.\d+\.w[13]\.weight",
    "down": r"(layers|mtp)\.\d+\.ffn\.experts\.\d+\.w2\.weight",
    "dense": r"layers\.\d+\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|ffn\.shared_experts\.w[123])\.weight",
    "embed": r"embed\.weight",
    "head": r"head\.weight",
    "compress": r"layers\.\d+\.attn\.((indexer\.)?compressor\.(wkv|wgate)"
    r"|indexer\.(wq_b|weights_proj))\.weight",
}
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _CLASSES.items()}


def class_of(name: str) -> str | None:
    """The Recipe field that governs an official tensor; None for what stays as shipped."""
    return next((kind for kind, p in _PATTERNS.items() if p.fullmatch(name)), None)


@dataclass(frozen=True)
class Recipe:
    """A format for each class of matrices."""

    name: str
    gate_up: Format  # routed experts, w1 and w3
    down: Format  # routed experts, w2
    dense: Format  # attention and shared experts
    embed: Format
    head: Format
    compress: Format  # both compressors, and the indexer

    def format_of(self, name: str, columns: int | None = None) -> Format | None:
        """The format of an official tensor; None for one that stays as shipped.

        `columns`, inputs a row, is for small models: groups shrink until they divide a row, and a
        matrix that no group divides stays as shipped.
        """
        kind = class_of(name)
        if kind is None:
            return None
        chosen: Format = getattr(self, kind)
        return chosen if columns is None else chosen.fitting(columns)

    def for_experts(self, dtype: str) -> "Recipe":
        """This recipe for a source whose routed experts are of config.json's `expert_dtype`.

        Native FP4 experts are kept; others have more to lose, and get the bits of the name. FP8
        experts are kept as they are by q8_0, since mxfp8 holds the same values.
        """
        bits = _EXPERT_BITS.get(self.name)
        if dtype == "fp4" or bits is None:
            return self
        experts = MXFP8 if bits == 8 and dtype == "fp8" else affine(bits)
        return replace(self, gate_up=experts, down=experts)


_EXPERT_BITS = {"q4_K_M": 4, "q5_K_M": 5, "q6_K": 6, "q8_0": 8}

_ALL = (
    Recipe("q2", affine(2, 128), affine(2, 64), affine(6), affine(4), affine(6), affine(8)),
    Recipe("q2_K_L", affine(2, 128), affine(3, 128), affine(6), affine(4), affine(6), affine(8)),
    Recipe("q3_K_S", affine(3, 128), affine(3, 128), affine(6), affine(4), affine(6), affine(8)),
    Recipe("q4_K_M", MXFP4, MXFP4, affine(5), affine(4), affine(6), affine(8)),
    Recipe("q5_K_M", MXFP4, MXFP4, affine(6), affine(6), affine(6), affine(8)),
    Recipe("q6_K", MXFP4, MXFP4, MXFP8, affine(8), affine(8), affine(8)),
    Recipe("q8_0", MXFP4, MXFP4, MXFP8, BF16, BF16, BF16),
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}
