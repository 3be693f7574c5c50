"""A plan as one JSON object: a model on a machine, every recipe, and which to take."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..config import Config
from ..loader import find_model
from ..quant.recipes import RECIPES
from ..weights.names import Drafter
from .estimate import (
    COMFORTABLE,
    Fit,
    Guess,
    fits,
    recommend,
    sequence_bytes,
    working_bytes,
)
from .flash import flash
from .hits import hit_rates
from .machines import Machine, PlanError
from .memory import DECODED, predict
from .placement import Budget
from .published import efficiency
from .sizes import drafter_bytes, kept_by, parameters, state_bytes, weight_sizes

DRAFTERS: tuple[Drafter, ...] = ("mtp", "dspark")
CONTEXTS = (8192, 32_768, 131_072, 1_048_576)


@dataclass(frozen=True)
class Model:
    """What is planned for."""

    name: str
    cfg: Config
    stored_bytes: int | None = None  # of its safetensors files, where they are here


def open_model(name: str, experts: int | None = None) -> Model:
    """ "flash", "demo", a folder or a downloaded hub id; `experts` kept of those in each layer."""
    if name == "flash":
        model = Model(name, flash())
    else:
        folder = find_model(name)
        config = Config.from_file(folder / "config.json")
        model = Model(name, config, _stored(folder))
    if experts is None:
        return model
    least, most = model.cfg.num_experts_per_tok, model.cfg.n_routed_experts
    if not least <= experts <= most:
        raise PlanError(f"--experts must be from {least} to {most} for {name}, not {experts}")
    return Model(f"{name}, {experts} experts", replace(model.cfg, n_routed_experts=experts))


def _stored(folder: Path) -> int | None:
    files = list(folder.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) if files else None


def make_report(
    model: Model, machine: Machine, context: int, guess: Guess = "off"
) -> dict[str, Any]:
    """The object of --json. Sizes are bytes, speeds tokens a second; estimates are named so."""
    if context > model.cfg.max_position_embeddings:
        most = model.cfg.max_position_embeddings
        raise PlanError(f"--context must be at most {most} for {model.name}, not {context}")
    found = fits(model.cfg, machine, context, guess)
    best = recommend(found)
    return {
        "machine": _machine(machine),
        "model": _model(model, machine),
        "context": context,
        "speculate": guess,
        "recipes": [_recipe(one, model.cfg, context, guess) for one in found],
        "recommended": None if best is None else best.recipe,
        "why": _why(machine, found, best),
        "formula": _formula(machine),
        "efficiency": asdict(efficiency(machine)),
    }


def _formula(machine: Machine) -> str:
    seen = efficiency(machine)
    return (
        f"decode: 1 / (bytes read a token / ({seen.bandwidth:.2f} x bandwidth) + bytes of experts "
        "off the GPU / link); prefill: 1 / the largest of operations / "
        f"({seen.compute:.2f} x TFLOP/s), bytes read / ({seen.bandwidth:.2f} x bandwidth x chunk) "
        "and bytes off the GPU / (1.1 link x chunk), of several cards the sum with the last; "
        f"shares: {seen.source}"
    )


def _machine(machine: Machine) -> dict[str, Any]:
    mac = machine.kind == "mac"
    return {
        "name": machine.name,
        "kind": machine.kind,
        "cards": machine.cards,
        "memory_gib": machine.memory,
        "host_memory_gib": machine.ram if machine.kind == "gpu" else None,
        "bandwidth_gb_s": machine.bandwidth,
        "tflops": machine.tflops,
        "link_gb_s": machine.link or None,
        "gpu_limit_bytes": int(machine.gpu_limit),
        "raised_limit_bytes": int(machine.raised_limit) if mac else None,
        "wired_limit_command": machine.wired_limit_command if mac else None,
        "working_bytes": working_bytes(machine),
    }


def _model(model: Model, machine: Machine) -> dict[str, Any]:
    cfg = model.cfg
    contexts = [n for n in CONTEXTS if n < cfg.max_position_embeddings]
    return {
        "name": model.name,
        "parameters": parameters(cfg),
        "experts": cfg.n_routed_experts,
        "shipped_bytes": weight_sizes(cfg).total,
        "stored_bytes": model.stored_bytes,
        "context_limit": cfg.max_position_embeddings,
        "state_bytes": state_bytes(cfg),
        "drafters": {kind: drafter_bytes(cfg, kind) for kind in DRAFTERS},
        "cache_rows": kept_by(machine.backend),
        "cache": [
            {"context": n, "bytes": sequence_bytes(cfg, machine, n)}
            for n in (*contexts, cfg.max_position_embeddings)
        ],
    }


def _recipe(one: Fit, cfg: Config, context: int, guess: Guess) -> dict[str, Any]:
    drafter = None if guess == "off" else one.drafter
    cuda = predict(cfg, RECIPES[one.recipe], context, drafter=drafter)  # if it holds everything
    return {
        "recipe": one.recipe,
        "weights_bytes": one.weights.total,
        "weights_by_class": dict(one.weights.by_class),
        "cache_bytes": one.cache,
        "token_bytes": one.weights.token,
        "cuda_bytes": asdict(cuda) | {"total": cuda.total},
        "drafter_bytes": {kind: drafter_bytes(cfg, kind, RECIPES[one.recipe]) for kind in DRAFTERS},
        "fits": one.fits,
        "where": one.where,
        "resident_experts": round(one.resident, 4),
        "largest_context": one.largest_context,
        "decode_tok_s_estimate": _rounded(one.decode),
        "decode_tok_s_ceiling": _rounded(one.decode_ceiling),
        "prefill_tok_s_estimate": _rounded(one.prefill),
        "placement": None if one.budget is None else _placement(one, one.budget),
    }


def describe(budget: Budget) -> dict[str, Any]:
    """Experts in two memories."""
    need = budget.need
    return {
        "resident_experts": round(budget.resident, 4),
        "expert_bytes_on_gpu": budget.slot_bytes,
        "host_bytes": budget.host_bytes,
        "other_weights_bytes": need.dense - need.table,
        "caches_and_working_bytes": need.beside(budget.chunk) + need.recorded(DECODED[-1]),
        "ring_bytes": budget.ring_bytes,
        "lent_bytes": budget.lent_bytes,
        "chunk": budget.chunk,
    }


def _placement(one: Fit, budget: Budget) -> dict[str, Any]:
    """Bytes of each card, and what routing does to speed."""
    hits = {kind: round(rate, 4) for kind, rate in hit_rates(budget).items()}
    skewed = _rounded(one.skewed)
    return {**describe(budget), "hit_rate_estimate": hits, "decode_skewed_tok_s_estimate": skewed}


def _rounded(speed: float | None) -> float | None:
    return None if speed is None else round(speed, 1)


def _why(machine: Machine, found: list[Fit], best: Fit | None) -> str:
    if best is None:
        least = found[0]
        need = least.weights.total + least.cache + working_bytes(machine)
        need += least.drafter * machine.cards
        return (
            f"nothing fits: even {least.recipe} needs {need / 2**30:.1f} GiB with its working "
            "memory; a pruned model (--experts) is smaller"
        )
    if best.decode is None:
        return "the most exact that fits; without --bandwidth no speed can be estimated"
    if best.decode >= COMFORTABLE:
        return f"the most exact with an estimated {COMFORTABLE:.0f} tok/s or more"
    return f"the most exact of the fastest; expect some {best.decode:.1f} tok/s"
