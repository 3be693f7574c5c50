"""`ds4 serve`: the APIs of OpenAI and Anthropic on this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import BackendError
from . import options
from .groups import grouped

SERVER, QUEUE = "Who is served", "How many are served"


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **more)


@dataclass(frozen=True)
class Server:
    """Settings of the server, under their names there."""

    host: Annotated[
        str | None, _option(SERVER, "The address; 127.0.0.1 unless told.", envvar="DS4_HOST")
    ] = None
    port: Annotated[
        int | None, _option(SERVER, "8000 unless told; 0 takes a free one.", envvar="DS4_PORT")
    ] = None
    api_key_file: Annotated[
        str | None,
        _option(
            SERVER, "A key a line, read again on SIGHUP. One key: DS4_API_KEY.", metavar="FILE"
        ),
    ] = None


@dataclass(frozen=True)
class Model:
    """Settings of a model, under their names there."""

    name: Annotated[
        str | None, _option(options.MODEL, "What requests call the model.", "--name")
    ] = None
    model: Annotated[
        str | None, _option(options.MODEL, "demo, a folder, or a hub id.", "--model", "-m")
    ] = None
    context: Annotated[
        int | None, _option(options.MODEL, "Tokens of prompt and answer together.", min=1)
    ] = None
    cache: Annotated[
        Literal["native", "exact"] | None, _option(options.MODEL, "As in `ds4 generate`.")
    ] = None
    backend: Annotated[
        str | None, _option(options.RUN, "auto, reference, mlx, cuda or torch.", "--backend", "-b")
    ] = None
    device: Annotated[str | None, _option(options.RUN, "auto, cpu, cuda:1 ...")] = None
    gpus: Annotated[
        int | None, _option(options.RUN, "So many GPUs of this host share each model.", min=1)
    ] = None
    gpu_memory: options.GpuMemory = None
    speculate: Annotated[
        Literal["off", "lookup", "mtp", "auto"] | None,
        _option(options.RUN, "Guess tokens, verify several at once: the same text."),
    ] = None
    slots: Annotated[
        int | None,
        _option(
            QUEUE,
            "Requests that run at once. Default: what memory has room for, few on a Mac.",
            min=1,
        ),
    ] = None
    snapshot_mib: Annotated[
        int | None, _option(QUEUE, "Memory for prefixes that no slot holds.", min=0)
    ] = None
    snapshot_dir: Annotated[
        str | None, _option(QUEUE, "A folder where prefixes outlive the server.")
    ] = None


@dataclass(frozen=True)
class Queue:
    """More settings of the server, under their names there."""

    queue: Annotated[
        int | None, _option(QUEUE, "Requests that may wait; 256 unless told.", min=1)
    ] = None
    drain_s: Annotated[
        float | None, _option(QUEUE, "Seconds that requests may go on after SIGTERM.", "--drain")
    ] = None
    hang_s: Annotated[
        float | None, _option(QUEUE, "Start an engine anew that is silent so long.", "--hang")
    ] = None
    client_sampling: Annotated[
        bool | None, _option(QUEUE, "A client's temperature counts while thinking, too.")
    ] = None
    traces: Annotated[
        bool | None, typer.Option("--traces", help="Tell OpenTelemetry.", show_default=False)
    ] = None
    log: Annotated[
        Literal["debug", "info", "warning", "error"] | None,
        typer.Option(help="How much is logged; info unless told.", show_default=False),
    ] = None


@grouped
def serve(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="A TOML file; options given here win.", show_default=False
        ),
    ] = None,
    *,
    server: Server,
    allow_host: Annotated[
        list[str] | None, _option(SERVER, "A name under which the server is called; repeatable.")
    ] = None,
    one: Model,
    random: options.Random,
    queue: Queue,
    power: Annotated[
        list[str] | None,
        typer.Option(help="A meter: auto, none, nvml, shelly:ADDRESS ...", show_default=False),
    ] = None,
) -> None:
    """Serve a model to OpenAI's, Anthropic's and other clients, and a page at /.

    Only this machine may connect, unless --host says otherwise; that takes an API key.
    """
    try:
        import msgspec

        from ..server import assembly
        from ..server.access import set_up_logging
        from ..server.settings import Settings, check, read_settings
    except ImportError as error:
        raise BackendError(f"ds4 serve needs {error.name}: pip install 'ds4[server]'") from error

    settings = read_settings(config) if config else Settings()
    changes = _given(vars(one))
    if (made := random.model(one.model or "demo")) is not None:
        changes |= {"synthetic": True, "model": made.model, "recipe": made.recipe}
        changes |= {"unique_layers": made.unique_layers, "routing": made.routing}
    if changes and len(settings.models) > 1:
        names = ", ".join(sorted(changes))
        raise typer.BadParameter(f"{config} has several models: say there what changes: {names}")
    whole = vars(server) | vars(queue) | {"power": tuple(power) if power else None}
    if allow_host:
        whole["hosts"] = (*settings.hosts, *allow_host)
    if changes:
        whole["models"] = tuple(msgspec.structs.replace(m, **changes) for m in settings.models)
    settings = msgspec.structs.replace(settings, **_given(whole))
    check(settings)
    set_up_logging(settings.log)
    assembly.serve(settings)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
