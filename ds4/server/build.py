"""From what a process is told to the engine that it runs, and what can be known without one."""

from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from ..errors import ConfigError
from ..loader import DEFAULT_CONTEXT, Synthetic, find_model, load, load_synthetic
from .client import ModelInfo
from .engine_process import Built, Progress
from .wire import EngineSpec

MIB = 2**20


def build(spec: EngineSpec, progress: Progress) -> Built:
    """Load the model and put an engine over it. Raises Ds4Error with the remedy."""
    from ..engine.engine import Engine
    from ..engine.prefix import PrefixCache
    from ..engine.scheduler import Limits

    place = spec.backend, spec.device, spec.cache, spec.context, spec.slots, progress
    where = *place, spec.gpus, spec.gpu_memory
    if spec.synthetic:
        llm = load_synthetic(_synthetic(spec), *where)
    else:
        llm = load(spec.model, *where, speculate=spec.speculate)
    runner = llm.runner
    disk = spec.snapshot_disk_mib * MIB if spec.snapshot_dir else 0
    known = PrefixCache(runner, spec.snapshot_mib * MIB, spec.snapshot_dir, disk)
    engine = Engine(llm, limits=Limits(waiting=spec.max_waiting), prefixes=known)
    engine.warm()  # or the first users wait for kernels to be compiled
    about = llm.context, runner.slots, runner.cfg.vocab_size, llm.backend_name, llm.device
    return Built(engine, *about)


@dataclass(frozen=True)
class Known:
    """A model as the HTTP side needs it: nothing here took longer than reading config.json."""

    model: ModelInfo
    context: int
    folder: Path  # of the tokenizer


def describe(spec: EngineSpec, name: str | None = None) -> Known:
    """What is known before the weights are. Raises ModelNotFound or ConfigError."""
    folder = find_model("demo" if spec.synthetic else spec.model)
    file = folder / "config.json"
    cfg = _synthetic(spec).config() if spec.synthetic else Config.from_file(file)
    if not (folder / "tokenizer.json").exists():
        raise ConfigError(f"{folder} has no tokenizer.json: a server needs the model's words")
    context = spec.context or min(cfg.max_position_embeddings, DEFAULT_CONTEXT)
    own = f"{spec.model}-synthetic" if spec.synthetic else _name(spec.model, folder)
    info = ModelInfo(name or own, cfg.vocab_size, int(file.stat().st_mtime))
    return Known(info, context, folder)


def _name(model: str, folder: Path) -> str:
    """The last part of what the user wrote: a hub's cache has folders named by hashes."""
    return Path(model).name if Path(model).name not in ("", ".", "..") else folder.resolve().name


def _synthetic(spec: EngineSpec) -> Synthetic:
    return Synthetic(spec.model, spec.recipe, spec.unique_layers, spec.routing)
