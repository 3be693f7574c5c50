"""Targets from the options of the command: our engine on a model, or a server somewhere."""

import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..draft.choose import Speculate
from ..loader import Synthetic, find_model, load, load_synthetic
from ..plan.sizes import weight_sizes
from ..quant.recipes import RECIPES
from .quality import NATIVE, recipe_of
from .target import EngineTarget
from .texts import token_texts

if TYPE_CHECKING:
    from ..llm import LLM

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
    speculate: Speculate = "off",
    **gpus: Any,
) -> EngineTarget:
    """The engine in this process, with room for `slots` sequences of `context` tokens.

    `gpus` are the loader's gpus and gpu_memory.
    """
    _reset_peak()
    if isinstance(model, Synthetic):
        llm = load_synthetic(model, backend, device, cache, context, slots, **gpus)
        eos, name = None, _called(model)
    else:
        gpus |= {"speculate": speculate}
        llm = load(model, backend, device, cache, context, slots, **gpus)
        eos, name = llm.config.eos_token_id, model
    return engine_target(llm, {"model": name, "recipe": recipe} | about, eos)


def _called(model: Synthetic) -> str:
    """A name that tells unlike models of random weights apart."""
    shared = f", {model.unique_layers} unique layers" if model.unique_layers else ""
    routed = "" if model.routing == "uniform" else f", {model.routing} routing"
    return f"{model.model} (random weights{shared}{routed})"


def engine_target(llm: "LLM", about: dict[str, Any], eos: int | None) -> EngineTarget:
    """A loaded model behind the engine; it belongs to the target from then on."""
    from ..engine.engine import Engine

    recipe = recipe_of(about["recipe"])
    weights = weight_sizes(llm.config, recipe).total if recipe is not None else None
    return EngineTarget(
        Engine(llm),
        token_texts(llm.tokenizer, llm.config.vocab_size),
        about
        | {
            "reached": "engine in process",
            "backend": llm.backend_name,
            "device": llm.device,
            "context": llm.context,
            "weights_bytes": weights,
            "slots": llm.runner.slots,
            "speculate": llm.speculator.drafter.name if llm.speculator else "off",
        },
        llm.context,
        eos,
        lambda: peak_memory(llm.device),
    )


def peak_memory(device: str) -> dict[str, int]:
    """Bytes at the most: of the process so far, of the device since the model was loaded."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    torch, mlx = sys.modules.get("torch"), sys.modules.get("mlx.core")
    if device.startswith("cuda") and torch is not None:
        count = torch.cuda.device_count()
        found["device"] = sum(torch.cuda.max_memory_allocated(i) for i in range(count))
    elif mlx is not None:
        found["device"] = mlx.get_peak_memory()
    return found


def _reset_peak() -> None:
    """Begin to look for the most memory anew, as far as a library can."""
    torch, mlx = sys.modules.get("torch"), sys.modules.get("mlx.core")
    if torch is not None and torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(i)
    if mlx is not None:
        mlx.reset_peak_memory()


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
