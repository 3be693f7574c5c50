"""`ds4 serve --config FILE`: everything that the command's options can say, and several models."""

from math import inf
from pathlib import Path
from typing import Literal

import msgspec

from ..errors import ConfigError
from .limits import Limits
from .supervisor import QueueLimits
from .wire import EngineSpec, ModelSpec

MOST_SLOTS = 32  # if the engine decides


class ModelSettings(ModelSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One [[models]] entry. `name` is what requests say."""

    name: str | None = None

    def spec(self, queue: int) -> EngineSpec:
        """For an engine behind a queue of so many requests, and those in its slots."""
        fields = msgspec.structs.asdict(self)
        del fields["name"]
        if self.snapshot_dir:
            fields["snapshot_dir"] = str(Path(self.snapshot_dir).expanduser())
        return EngineSpec(**fields, max_waiting=queue + (self.slots or MOST_SLOTS))


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file. Seconds end in _s, tokens in _tokens.

    hosts            names, besides its own, under which the server may be addressed
    queue            requests that may wait, of each model
    at_once_each     requests that one API key may have running
    drain_s          how long requests may go on when the server is told to end
    hang_s           an engine that is silent for so long is started anew
    power            meters that are read: auto, none, nvml, rapl, smc, shelly:ADDRESS ...
    traces           tell OpenTelemetry's collector of each request
    client_sampling  a client's temperature counts while the model thinks, too
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: str | None = None
    hosts: tuple[str, ...] = ()
    queue: int = 256
    queue_tokens: int = 4_000_000
    at_once_each: int = 512
    body_mib: int = 32
    drain_s: float = 30.0
    hang_s: float = 120.0
    power: tuple[str, ...] = ("auto",)
    traces: bool = False
    client_sampling: bool = False
    log: Literal["debug", "info", "warning", "error"] = "info"
    models: tuple[ModelSettings, ...] = (ModelSettings(),)

    @property
    def limits(self) -> Limits:
        return Limits(body=self.body_mib * 2**20, at_once_each=self.at_once_each)

    @property
    def queue_limits(self) -> QueueLimits:
        return QueueLimits(self.queue, self.queue_tokens)


def read_settings(file: Path) -> Settings:
    """Raises ConfigError with the file, the field and what is wrong."""
    try:
        settings = msgspec.toml.decode(file.read_bytes(), type=Settings)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from error
    check(settings, f"{file}: ")
    return settings


def check(settings: Settings, where: str = "") -> None:
    """Raises ConfigError for what no server can be run with.

    where  the file that fields are named in; "" where they came as options
    """
    if not settings.models:
        raise ConfigError(f"{where}there is no [[models]] entry: name at least one model")
    positive = ("queue", "queue_tokens", "at_once_each", "body_mib", "drain_s", "hang_s")
    for name in positive:
        if not 0 < (value := getattr(settings, name)) < inf:
            said = name if where else "--" + name.removesuffix("_s")
            raise ConfigError(f"{where}{said} must be a finite number above 0, not {value}")
    if not 0 <= settings.port < 65536:
        said = "port" if where else "--port"
        raise ConfigError(f"{where}{said} must be from 0 to 65535, not {settings.port}")
    for model in settings.models:
        if any(n is not None and n < 1 for n in (model.slots, model.gpus)):
            raise ConfigError(f"{where}slots and gpus must be at least 1")
        if min(model.snapshot_mib, model.snapshot_disk_mib) < 0:
            raise ConfigError(f"{where}snapshots must be at least 0 MiB")
