"""Targets from the options of the command: our engine on a model, or a server somewhere."""

import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..loader import Synthetic, find_model, load, load_synthetic
from ..quant.recipes import RECIPES, Recipe
from .target import EngineTarget
from .texts import token_texts

if TYPE_CHECKING:
    from ..llm import LLM

NATIVE = "native"
MATRIX = NATIVE, *(name for name in RECIPES if name != "q8_0")


def open_engine(
    model: str | Synthetic,
    recipe: str,
    about: dict[str, Any],
    backend: str,
    device: str,
    cache: Any,
    context: int | None,
    slots: int,
    **gpus: Any,
) -> EngineTarget:
    """The engine in this process, with room for `slots` sequences of `context` tokens.

    `gpus` are the loader's gpus and gpu_memory.
    """
    if isinstance(model, Synthetic):
        llm = load_synthetic(model, backend, device, cache, context, slots, **gpus)
        eos, name = None, f"{model.model} (random weights)"
    else:
        llm = load(model, backend, device, cache, context, slots, **gpus)
        eos, name = llm.config.eos_token_id, model
    return engine_target(llm, {"model": name, "recipe": recipe} | about, eos)


def engine_target(llm: "LLM", about: dict[str, Any], eos: int | None) -> EngineTarget:
    """A loaded model behind the engine; it belongs to the target from then on."""
    from ..engine.engine import Engine

    return EngineTarget(
        Engine(llm),
        token_texts(llm.tokenizer, llm.config.vocab_size),
        about
        | {
            "reached": "engine in process",
            "backend": llm.backend_name,
            "device": llm.device,
            "context": llm.context,
            "slots": llm.runner.slots,
        },
        llm.context,
        eos,
        lambda: peak_memory(llm.device),
    )


def peak_memory(device: str) -> dict[str, int]:
    """Bytes at the most: of the process, and of the device as its library counts them."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    torch, mlx = sys.modules.get("torch"), sys.modules.get("mlx.core")
    if device.startswith("cuda") and torch is not None:
        count = torch.cuda.device_count()
        found["device"] = sum(torch.cuda.max_memory_allocated(i) for i in range(count))
    elif mlx is not None:
        found["device"] = mlx.get_peak_memory()
    return found


def quality(recipe: str) -> str:
    """What is known of a recipe without measuring it."""
    made = RECIPES.get("q8_0" if recipe == NATIVE else recipe)
    if made is None:
        return "unknown"
    if made.name == "q8_0":
        return "weights as shipped"
    bits = _bits(made)
    kept = " (as shipped)" if made.gate_up.mode == "mxfp4" else ""
    return f"experts {bits:.2f} bits{kept}, other matrices {made.dense.bits_per_weight:.2f} bits"


def _bits(recipe: Recipe) -> float:
    """Of an expert's weight: two of its three matrices are gate and up."""
    return (2 * recipe.gate_up.bits_per_weight + recipe.down.bits_per_weight) / 3


# all recipes


def matrix(
    model: str | Synthetic, recipes: Sequence[str], folder: Path
) -> Iterator[tuple[str | Synthetic, str]]:
    """The model in each recipe: random weights are made so, a checkpoint is quantized.

    Quantized checkpoints are kept in `folder`, and used again from there.
    """
    for recipe in recipes:
        if isinstance(model, Synthetic):
            yield replace(model, recipe=recipe), recipe
        elif recipe == NATIVE:
            yield model, recipe
        else:
            from ..quant.quantize import quantize_checkpoint

            target = folder / recipe
            quantize_checkpoint(find_model(model), target, recipe)
            yield str(target), recipe
