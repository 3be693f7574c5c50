"""What a recipe keeps of a model: by its formats, and as `ds4 eval --ladder` measured it."""

import json
from pathlib import Path

from ..errors import BenchError
from ..quant.recipes import RECIPES, Recipe

NATIVE = "native"


def recipe_of(name: str) -> Recipe | None:
    """A recipe by the name that results have; None for a foreign one."""
    return RECIPES.get("q8_0" if name == NATIVE else name)


def note(name: str) -> str:
    """What is known without measuring."""
    made = recipe_of(name)
    if made is None:
        return "unknown"
    if made.name == "q8_0":
        return "weights as shipped"
    kept = " (as shipped)" if made.gate_up.mode == "mxfp4" else ""
    dense = made.dense.bits_per_weight
    return f"experts {_expert_bits(made):.2f} bits{kept}, other matrices {dense:.2f} bits"


def _expert_bits(recipe: Recipe) -> float:
    """Of an expert's weight: two of its three matrices are gate and up."""
    return (2 * recipe.gate_up.bits_per_weight + recipe.down.bits_per_weight) / 3


def measured(path: Path) -> dict[str, str]:
    """Recipe -> its distance from the source, from the JSON of `ds4 eval --ladder`.

    Raises BenchError if the file is something else.
    """
    try:
        said = json.loads(path.read_text("utf-8"))
        rows = [row for row in said["recipes"] if row["recipe"] is not None]
        rows.sort(key=lambda row: row["kl"], reverse=True)  # the best of a recipe comes last
        return {
            row["recipe"]: f"KL {row['kl']:.4f} ± {row['kl_error']:.4f}, top-1 {row['top1']:.1%} "
            f"on {said['text']}"
            for row in rows
        }
    except OSError as error:
        raise BenchError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path}: not the JSON of ds4 eval --ladder: {error}") from error
