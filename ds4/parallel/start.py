"""Before a model is loaded: the other processes that are to load it, and what is popular in it."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from ..errors import BackendError, ConfigError, Ds4Error
from ..json_fields import read_json
from .crew import Lead
from .follow import tell_model
from .launch import from_environment, join


def start(
    kind: str, model: Any, options: dict[str, Any], gpus: int, heat_map: Path | None = None
) -> None:
    """Let the other processes of the model load it too, if there are to be any.

    `kind` is the function of loader.py that does it, `options` its arguments besides the model.
    Raises BackendError.
    """
    if gpus == 1 and from_environment() is None:
        return
    if options["backend"] not in ("cuda", "torch"):
        raise BackendError(
            f"the backend {options['backend']} cannot run on several GPUs this way: use --backend "
            "cuda, or torch for CPUs; MLX has mlx.launch"
        )
    crew = join(gpus)
    if isinstance(crew, Lead) and crew.tells:
        crew.popularity = None if heat_map is None else popularity(heat_map)
        tell_model(crew, kind, model, options)


def heat_map_of(folder: Path) -> Path:
    """Where a model's heat map is kept: which experts its users need most. One a rank."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ds4" / "heat"
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    seat = from_environment()
    rank = f".{seat.rank}" if seat is not None and seat.rank else ""
    return cache / f"{folder.name}-{key}{rank}.json"


def popularity(heat_map: Path) -> list[list[int]] | None:
    """How often each layer's experts were chosen: the sum of all ranks' heat maps, if any."""
    found: list[list[list[int]]] = []
    for file in heat_map.parent.glob(f"{heat_map.stem}*.json"):
        with contextlib.suppress(Ds4Error, KeyError, TypeError):  # opening it tells why
            found.append(read_json(file, ConfigError, "remove it")["pairs"])
    layers = zip(*found, strict=False)
    return [[sum(counts) for counts in zip(*each, strict=False)] for each in layers] or None
