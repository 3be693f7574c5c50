"""`ds4 bench`: speeds, and joules where there is a meter, by a protocol that a file holds."""

import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import options
from .groups import grouped
from .terminal import console

if TYPE_CHECKING:
    from ..bench.run import Protocol
    from ..bench.target import Target
    from ..bench.workload import Workload
    from ..power.opening import Sources
    from ..power.window import Trace

WHAT, POWER, MONEY = "What is measured", "Power", "Cost"


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **more)


@dataclass(frozen=True)
class Cost:
    """What a machine and its energy cost."""

    price: Annotated[float | None, _option(MONEY, "Of the machine, in dollars.", min=0)] = None
    duty: Annotated[float, _option(MONEY, "Share of the time that it works; 0.5.")] = 0.5
    tariff: Annotated[float, _option(MONEY, "Dollars a kWh; 0.20.", min=0)] = 0.20
    years: Annotated[float, _option(MONEY, "Until it is worth nothing; 5.")] = 5.0


@dataclass(frozen=True)
class Work:
    """What is asked of a model, how often and in which order."""

    workloads: Annotated[
        str, _option(WHAT, "standard, quick, or a TOML file (docs/power.md).", "--workloads", "-w")
    ] = "standard"
    only: Annotated[list[str] | None, _option(WHAT, "Only this workload; may be repeated.")] = None
    quick: Annotated[
        bool, _option(WHAT, "Two minutes: the quick workloads, once, short idle.", "--quick")
    ] = False
    repeat: Annotated[int | None, _option(WHAT, "Times that each is measured; 3.", min=1)] = None
    seed: Annotated[int, _option(WHAT, "Of prompts and of the order.")] = 0
    warm: Annotated[
        float | None, _option(WHAT, "Seconds at most until a warm-up is steady; 60.", min=0)
    ] = None
    idle: Annotated[float | None, _option(POWER, "Seconds of idle baseline; 60.", min=0)] = None

    def chosen(self) -> "list[Workload]":
        """Raises BenchError for a file that cannot be read."""
        from ..bench.workload import read_workloads

        quick = self.quick and self.workloads == "standard"
        return read_workloads("quick" if quick else self.workloads, self.only or ())

    def protocol(self) -> "Protocol":
        from ..bench.run import Protocol

        protocol = Protocol(seed=self.seed)
        given = {"repeat": self.repeat, "idle_s": self.idle, "warm_s": self.warm}
        more: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(protocol.quick() if self.quick else protocol, **more)


@dataclass(frozen=True)
class Server:
    """A server that is measured instead of a model here."""

    url: Annotated[
        str | None, _option(WHAT, "An OpenAI-compatible server instead of a model here.")
    ] = None
    api: Annotated[
        Literal["completions", "chat"], _option(WHAT, "With --url, what it is asked.")
    ] = "completions"
    api_key: Annotated[
        str | None, _option(WHAT, "With --url.", "--api-key", envvar="DS4_API_KEY")
    ] = None

    def targets(self, recipe: str, name: str | None) -> "Iterator[Target]":
        from ..bench.server import ServerTarget

        assert self.url is not None
        about = {"recipe": recipe, "quality": "as its operator says", "reached": "server"}
        about |= {"model": name} if name else {}
        yield ServerTarget(self.url, about, self.api, self.api_key)


@dataclass(frozen=True)
class Meters:
    """Where watts come from."""

    power: Annotated[
        list[str] | None,
        _option(POWER, "auto, none, nvml, ioreport, smc, rapl, hwmon, shelly:ADDRESS, csv:FILE."),
    ] = None
    calibration: Annotated[
        Path | None, _option(POWER, "A file made with --calibrate: estimates the wall.")
    ] = None
    calibrate: Annotated[
        Path | None, _option(POWER, "With a meter at the wall: write such a file.")
    ] = None


@grouped
def bench(
    out: Annotated[Path, typer.Argument(help="The results file, written at the end.")],
    *,
    work: Work,
    server: Server,
    matrix: Annotated[
        bool,
        _option(WHAT, "All recipes of the model; or those of --recipe q2,q4_K_M.", "--matrix"),
    ] = False,
    folder: Annotated[
        Path | None, _option(WHAT, "With --matrix, keep quantized checkpoints here.")
    ] = None,
    quality: Annotated[
        Path | None, _option(WHAT, "What ds4 eval --ladder --json printed: what recipes lose.")
    ] = None,
    slots: Annotated[
        int | None, _option(WHAT, "Sequences at once; what the workloads need.", min=1)
    ] = None,
    name: Annotated[
        str | None, _option(WHAT, "What results call the model: those of one name are compared.")
    ] = None,
    label: Annotated[str | None, _option(WHAT, "The machine's name in reports.")] = None,
    place: options.Place,
    speculate: options.Speculate = "off",
    random: options.Random,
    meters: Meters,
    cost: Cost,
) -> None:
    """Measure a model here, or a server, and write one results file for `ds4 compare`.

    Without a meter there are speeds and no joules. Ended by Ctrl-C or SIGTERM, it
    writes what it has.
    """
    from ..bench.cost import Terms
    from ..bench.environment import environment, machine_name
    from ..bench.quality import measured
    from ..bench.results import build, save
    from ..bench.run import Bench
    from ..power import Sampler
    from ..power.calibration import fit
    from ..power.calibration import load as load_calibration
    from ..power.opening import open_sources

    random_model = random.synthetic is not None
    if server.url and (matrix or random_model):
        raise typer.BadParameter("a server has one model", param_hint="--url")
    if speculate != "off" and (server.url or random_model):
        raise typer.BadParameter("it needs a model with a meaning, here", param_hint="--speculate")
    recipes = [random.recipe] if server.url else _recipes(random.recipe, matrix, random_model)
    _check_writable(out, meters.calibrate, folder)
    terms, chosen, protocol = Terms(**vars(cost)), work.chosen(), work.protocol()
    lost = measured(quality) if quality else {}
    line = load_calibration(meters.calibration) if meters.calibration else None
    other = place.model if random_model else None
    model = replace(random, recipe=recipes[0]).model(other) or place.model
    sources = open_sources(meters.power or ["auto"])
    with tempfile.TemporaryDirectory() as temporary:
        if server.url:
            targets = server.targets(random.recipe, name)
        else:
            targets = _engines(
                model,
                recipes,
                name or (None if random_model else place.model),
                (folder or Path(temporary)) if matrix or len(recipes) > 1 else None,
                lost,
                {
                    **place.where(),
                    "context": place.context or _context(chosen, model),
                    "slots": slots or max(one.concurrency for one in chosen),
                    "speculate": speculate,
                },
            )
        sampler = Sampler(sources.live)
        with _ending_is_ctrl_c():
            tell = console(stderr=True).print
            found = Bench(protocol, sampler, tell).run(targets, chosen)
    traces = [*sampler.traces, *_logged(sources, found.epoch_minus_clock)]
    results = build(found, traces, sources.absent, environment(), terms, label, line)
    save(out, results)
    if meters.calibrate:
        fit(traces, machine_name(results["environment"]["machine"])).save(meters.calibrate)
    _show(results)


def _recipes(given: str, matrix: bool, random_model: bool) -> Sequence[str]:
    """Names of recipes. A single one that nothing is made in may be any, as a peer calls it."""
    from ..bench.opening import MATRIX
    from ..bench.quality import NATIVE
    from ..quant.recipes import RECIPES

    if matrix and given == NATIVE:  # the default: none was named
        return MATRIX
    recipes, known = given.split(","), (NATIVE, *RECIPES)
    unknown = [name for name in recipes if name not in known]
    if unknown and (matrix or random_model or len(recipes) > 1):
        text = f"no recipe is called {unknown[0]!r}: there are {', '.join(known)}"
        raise typer.BadParameter(text, param_hint="--recipe")
    return recipes


def _check_writable(out: Path, calibrate: Path | None, folder: Path | None) -> None:
    """Find out before a measurement, not after it. Raises BadParameter."""
    from ..weights.shard_file import check_writable

    if calibrate is not None and calibrate.resolve() == out.resolve():
        raise typer.BadParameter(f"{out} is for the results", param_hint="--calibrate")
    for option, path in ("OUT", out), ("--calibrate", calibrate), ("--folder", folder):
        if path is None:
            continue
        if path is folder:  # made with its parents
            there = next(one for one in (path, *path.absolute().parents) if one.exists())
            tried = there / ".ds4-writable"
        elif path.parent.is_dir():
            tried = path
        else:
            raise typer.BadParameter(f"there is no folder {path.parent}", param_hint=option)
        try:
            check_writable(tried)
        except OSError as error:
            text = f"{path}: cannot be written: {error.strerror}"
            raise typer.BadParameter(text, param_hint=option) from error


def _logged(sources: "Sources", epoch_minus_clock: float) -> "Iterator[Trace]":
    """What meters logged; a file that cannot be read must not cost the measurement."""
    from ..errors import PowerError
    from ..power.meter_file import read_meter

    for file in sources.files:
        try:
            yield read_meter(file, epoch_minus_clock)
        except PowerError as error:
            sources.absent.append(str(error))
            console(stderr=True).print(f"not used: {error}", style="bold", markup=False)


@contextmanager
def _ending_is_ctrl_c() -> Iterator[None]:
    """SIGTERM ends a measurement as Ctrl-C does: what there is gets written."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _context(workloads: "list[Workload]", model: Any) -> int:
    """What the workloads need, of what the model allows."""
    from ..config import Config
    from ..loader import Synthetic, find_model

    most = (
        model.config()
        if isinstance(model, Synthetic)
        else Config.from_file(find_model(model) / "config.json")
    ).max_position_embeddings
    return min(most, max(one.context for one in workloads) + 64)


def _engines(
    model: Any,
    recipes: Sequence[str],
    name: str | None,
    folder: Path | None,
    lost: dict[str, str],
    how: dict[str, Any],
) -> "Iterator[Target]":
    """Without a folder for them the recipe is only a name; else each is made from the model."""
    import gc

    from ..bench import opening
    from ..bench.quality import note

    pairs = opening.matrix(model, recipes, folder) if folder else iter([(model, recipes[0])])
    for one, called in pairs:
        gc.collect()  # two models may not fit in memory, and the last one may be in a cycle
        about = {"quality": lost.get(called, note(called))} | ({"model": name} if name else {})
        yield opening.open_engine(one, called, about, **how)


def _show(results: dict[str, Any]) -> None:
    from ..bench.tables import summary_text

    console().print(summary_text(results), highlight=False, markup=False, soft_wrap=True)
