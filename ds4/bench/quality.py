"""What a recipe keeps of a model: by its formats, and as `ds4 eval --ladder` measured it."""

from pathlib import Path

from ..errors import BenchError
from ..json_fields import read_json
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
    remedy = "give what ds4 eval --ladder --json printed"
    said = read_json(path, BenchError, remedy)
    try:
        rows = [row for row in said["recipes"] if row["recipe"] is not None]
        rows.sort(key=lambda row: row["kl"], reverse=True)  # the best of a recipe comes last
        return {
            row["recipe"]: f"KL {row['kl']:.4f} ± {row['kl_error']:.4f}, top-1 {row['top1']:.1%} "
            f"on {said['text']}"
            for row in rows
        }
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path}: not the JSON of ds4 eval --ladder: {error}; {remedy}") from error
