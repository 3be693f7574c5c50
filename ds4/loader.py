"""From a model's name to a model that runs."""

import importlib.util
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from .backend import CacheMode, open_backend
from .check import small_config
from .config import Config
from .draft.choose import Speculate, drafter_bytes, speculator
from .errors import BackendError, ConfigError, ModelNotFound
from .folder import sampling_defaults, wordless, words
from .llm import LLM
from .parallel.start import heat_map_of, start
from .plan.flash import flash
from .plan.placement import memory_bytes, need_of
from .plan.slots import default_slots
from .quant.recipes import RECIPES
from .runner import Runner
from .weights import Checkpoint, load_weights
from .weights.identity import identity
from .weights.synthetic import Routing, SyntheticCheckpoint

DEFAULT_CONTEXT = 32_768

Progress = Callable[[int, int], None]


def load(
    model: str | os.PathLike[str] = "demo",
    backend: str = "auto",
    device: str = "auto",
    cache: CacheMode = "native",
    context: int | None = None,
    slots: int | None = 1,
    progress: Progress | None = None,
    gpus: int = 1,
    gpu_memory: str | int | None = None,
    speculate: Speculate = "off",
) -> LLM:
    """Load a model.

    model     "demo", a folder with config.json and safetensors, or a hub id downloaded before
    backend   "auto", or an entry point of the group ds4.backends: "mlx", "cuda", "reference"
    device    "auto", "cpu", or what the backend knows ("cuda:1", "gpu")
    cache     "native" rounds cache rows as the model was trained; "exact" rounds nothing
    context   tokens a sequence may have; None takes the model's limit, at most 32,768
    slots     sequences held at once; None: what memory has room for, few on a Mac
    progress  called with bytes done and bytes in all while weights are loaded
    gpus      processes, each with a GPU and a share of the experts, that run the model together
    gpu_memory  "32GB", or bytes, of each: experts beyond it stay in host memory; None: what is free
    speculate   guess tokens and verify several in a step, which changes no text: "off", "lookup" in
                the text so far, "mtp" by the checkpoint's own drafter, "auto" one of the two

    Raises ModelNotFound, ConfigError, CheckpointError or BackendError, each with the remedy.
    """
    folder = find_model(model)
    cfg = Config.from_file(folder / "config.json")
    context = _context(cfg, context)
    backend = choose_backend()[0] if backend == "auto" else backend
    heat_map = heat_map_of(folder)
    options = {"backend": backend, "device": device, "cache": cache, "gpu_memory": gpu_memory}
    options |= {"context": context, "slots": slots, "speculate": speculate}
    start("load", model, options, gpus, heat_map)
    be = open_backend(backend, device, cache)
    tokenizer, chat = words(folder)
    defaults, checkpoint = sampling_defaults(folder), Checkpoint(folder)
    given = cfg, checkpoint, context, slots, gpu_memory, heat_map
    slots = _place(be, *given, drafter_bytes(cfg, checkpoint, speculate))
    weights = load_weights(be, cfg, checkpoint, progress)
    runner = Runner(be, cfg, weights, context, slots, identity=lambda: identity(checkpoint.files))
    guesses = speculator(runner, checkpoint, speculate)
    why = wordless(folder)
    return LLM(runner, tokenizer, chat, defaults, checkpoint.extras, guesses, why)


@dataclass(frozen=True)
class Synthetic:
    """A model of random weights, to measure with: its text means nothing.

    model          whose shapes: "flash", "tiny", "demo", or a folder with config.json
    recipe         the formats of its weights; "native" is another name for q8_0
    unique_layers  see SyntheticCheckpoint: native flash needs 146 GiB in all, with 7 a sixth of it
    routing        "uniform", or "skewed": some experts are chosen far more often
    layers         only so many of its layers; None: all
    """

    model: str = "flash"
    recipe: str = "native"
    unique_layers: int | None = None
    routing: Routing = "uniform"
    seed: int = 0
    layers: int | None = None

    def config(self) -> Config:
        """Raises ModelNotFound or ConfigError."""
        cfg = self._whole()
        if self.layers is None or self.layers == cfg.num_hidden_layers:
            return cfg
        if not 0 < self.layers < cfg.num_hidden_layers:
            most = cfg.num_hidden_layers
            raise ConfigError(
                f"layers must be from 1 to {most} for {self.model}, not {self.layers}"
            )
        ratios = cfg.compress_ratios[: self.layers]
        hashed = min(cfg.num_hash_layers, self.layers)
        return replace(
            cfg, num_hidden_layers=self.layers, compress_ratios=ratios, num_hash_layers=hashed
        )

    def _whole(self) -> Config:
        if self.model == "flash":
            return flash()
        if self.model == "tiny":
            return small_config()
        return Config.from_file(find_model(self.model) / "config.json")

    def source(self) -> SyntheticCheckpoint:
        """The weights, for load_weights. Raises ConfigError for an unknown recipe or routing."""
        recipes = {"native": RECIPES["q8_0"], **RECIPES}
        if self.recipe not in recipes:
            raise ConfigError(
                f"no recipe is called {self.recipe!r}: there are {', '.join(recipes)}"
            )
        return SyntheticCheckpoint(
            self.config(), self.seed, recipes[self.recipe], self.routing, self.unique_layers
        )


def load_synthetic(
    model: Synthetic,
    backend: str = "auto",
    device: str = "auto",
    cache: CacheMode = "native",
    context: int | None = None,
    slots: int | None = 1,
    progress: Progress | None = None,
    gpus: int = 1,
    gpu_memory: str | int | None = None,
) -> LLM:
    """Make a model of random weights. It reads with the demo's tokenizer if its vocabulary can."""
    cfg, source = model.config(), model.source()
    context = _context(cfg, context)
    backend = choose_backend()[0] if backend == "auto" else backend
    options = {"backend": backend, "device": device, "cache": cache, "gpu_memory": gpu_memory}
    options |= {"context": context, "slots": slots}
    start("load_synthetic", model, options, gpus)
    be = open_backend(backend, device, cache)
    tokenizer, chat = words(find_model("demo"))
    if tokenizer is not None and tokenizer.size > cfg.vocab_size:
        tokenizer = chat = None
    slots = _place(be, cfg, source, context, slots, gpu_memory)
    weights = load_weights(be, cfg, source, progress)
    runner = Runner(be, cfg, weights, context, slots, identity=lambda: repr(model))
    why = (
        f"random weights in the shapes of {model.model} have no tokenizer; --synthetic demo and a "
        "folder with a tokenizer.json have one; else give token ids"
    )
    return LLM(runner, tokenizer, chat, wordless=why)


def _place(
    be: Any,
    cfg: Config,
    source: Any,
    context: int,
    slots: int | None,
    gpu_memory: str | int | None,
    heat_map: Path | None = None,
    drafter: int | None = None,
) -> int:
    """Before weights are loaded: how many slots there will be. Raises ConfigError, BackendError.

    A backend that can may decide which experts go to host memory. `drafter`: as in Need.
    """
    if slots is not None and slots < 1:
        raise ConfigError(f"slots must be at least 1, not {slots}")
    limit, places = memory_bytes(gpu_memory), hasattr(be, "place")
    if limit is not None and not places:
        raise BackendError(
            f"gpu_memory: backend {be.name} on {be.device} has no second memory: leave it out"
        )
    if slots is not None and not places:
        return slots
    shared = len(set(getattr(source, "same_as", {}).values()))
    whole = shared in (0, cfg.num_hidden_layers)  # else layers share weights, which always fit
    holds = getattr(be, "holds", None)
    held = holds(0, cfg.n_routed_experts) if holds else None
    need = need_of(cfg, source, context, 1, None if held is None else len(held))
    cache: CacheMode = getattr(be, "cache", "native")
    need = replace(need, cache=cache, drafter=drafter)
    if slots is None:
        kept = need.dense + need.experts if whole else sum(map(source.nbytes, source.kept()))
        slots = default_slots(be, need, kept, limit)
    if places and whole:
        be.place(replace(need, slots=slots), limit, heat_map)
    return slots


def find_model(model: str | os.PathLike[str]) -> Path:
    """The folder of a packaged model, a path, or a hub id in the local hub cache."""
    if str(model) == "demo":
        return Path(str(resources.files("ds4") / "demo"))
    folder = Path(model)
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise ModelNotFound(f"{str(folder)!a}: a name that is not UTF-8; rename it") from error
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelNotFound(f"{folder} is a file: give the folder that holds it")
    if str(model).count("/") == 1 and not folder.is_absolute():
        return _downloaded(str(model))
    raise ModelNotFound(
        f"no model is called {str(model)!r}, and there is no such folder: the packaged model is "
        "demo; else give a checkpoint's folder, or a hub id such as deepseek-ai/DeepSeek-V4-Flash"
    )


def _downloaded(hub_id: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from .weights.download import NEEDED, NOT_NEEDED

    try:
        folder = huggingface_hub.snapshot_download(
            hub_id, allow_patterns=NEEDED, ignore_patterns=NOT_NEEDED, local_files_only=True
        )
        return Path(folder)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelNotFound(
            f"{hub_id} is no folder here and has not been downloaded: ds4 pull {hub_id}"
        ) from error


def choose_backend() -> tuple[str, str]:
    """The backend for this machine, and why."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        if importlib.util.find_spec("mlx"):
            return "mlx", "Apple Silicon, and mlx is installed"
        return "reference", "Apple Silicon, but mlx is not installed: pip install mlx"
    if not _has_nvidia_driver():
        return "reference", "no NVIDIA driver and no Apple Silicon: the CPU in NumPy"
    if not importlib.util.find_spec("torch"):
        return "reference", "an NVIDIA GPU, but torch is not installed: pip install 'ds4[cuda]'"
    import torch

    if torch.cuda.is_available():
        return "cuda", f"{torch.cuda.get_device_name()}, and torch {torch.__version__} sees it"
    return "reference", f"an NVIDIA driver, but torch {torch.__version__} sees no GPU"


def _has_nvidia_driver() -> bool:
    devices = "/dev/nvidiactl", "/dev/dxg"  # Linux; Windows' Linux
    return platform.system() == "Windows" or any(os.path.exists(device) for device in devices)


def _context(cfg: Config, context: int | None) -> int:
    most = cfg.max_position_embeddings
    if context is None:
        return min(most, DEFAULT_CONTEXT)
    if not 0 < context <= most:
        raise ConfigError(f"context must be from 1 to {most} for this model, not {context}")
    return context
