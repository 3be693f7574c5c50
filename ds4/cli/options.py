"""Options that several commands share, and the loading that they lead to."""

import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .terminal import console, loading_bar

if TYPE_CHECKING:
    from ..llm import LLM
    from ..loader import Synthetic

MODEL, RUN, SAMPLING = "Model", "Where it runs", "Sampling"
RANDOM = "Random weights, to measure with"


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


def _drawn(text: str) -> Any:
    """An option whose default is the model's own, from its generation_config.json."""
    return _option(SAMPLING, text, show_default="the model's")


Model = Annotated[
    str, _option(MODEL, "demo, a folder, or a hub id downloaded before.", "--model", "-m")
]
Context = Annotated[
    int | None, _option(MODEL, "Tokens of prompt and answer together.", min=1, show_default=False)
]
CacheMode = Annotated[
    Literal["native", "exact"],
    _option(MODEL, "native rounds the cache as the model was trained; exact rounds nothing."),
]
SyntheticModel = Annotated[
    str | None,
    _option(
        RANDOM, "flash, tiny, demo or a folder: its shapes.", "--synthetic", show_default=False
    ),
]
Recipe = Annotated[str, _option(RANDOM, "Formats: native, q2, q4_K_M ...", "--recipe", "-r")]
UniqueLayers = Annotated[
    str, _option(RANDOM, "So many layers have their own; later ones share. flash: 7 or more.")
]
Routing = Annotated[
    Literal["uniform", "skewed"], _option(RANDOM, "How often each expert is chosen.")
]
BackendName = Annotated[
    str, _option(RUN, "auto, reference, mlx, cuda or torch.", "--backend", "-b")
]
Device = Annotated[str, _option(RUN, "auto, cpu, or a device of the backend, such as cuda:1.")]

Gpus = Annotated[
    int, _option(RUN, "So many GPUs of this host share the experts, a process each.", min=1)
]

GpuMemory = Annotated[
    str | None,
    _option(
        RUN,
        "Such as 32GB: experts beyond it stay in host memory; else what is free.",
        show_default=False,
    ),
]

Speculate = Annotated[
    Literal["off", "lookup", "mtp", "auto"],
    _option(RUN, "Guess tokens, verify several at once: the same text, sooner where it pays."),
]

MaxTokens = Annotated[int, _option(SAMPLING, "Stop after so many tokens.", "--max-tokens", "-n")]
MaxAnswer = Annotated[
    int | None,
    _option(
        SAMPLING, "End an answer after so many tokens.", "--max-tokens", "-n", show_default=False
    ),
]
Temperature = Annotated[float | None, _drawn("0 takes the most likely token.")]
TopP = Annotated[float | None, _drawn("Only the likeliest that add up to this probability.")]
TopK = Annotated[int | None, _drawn("Only so many of the likeliest; 0 for all.")]
MinP = Annotated[float | None, _drawn("Only those this likely relative to the likeliest.")]
RepetitionPenalty = Annotated[float | None, _drawn("Divides what was there before.")]
PresencePenalty = Annotated[float | None, _drawn("Taken off what was said before, once.")]
FrequencyPenalty = Annotated[float | None, _drawn("Taken off for each time it was said.")]
Seed = Annotated[int | None, _option(SAMPLING, "The same seed, the same text.", show_default=False)]
Stop = Annotated[
    list[str] | None,
    _option(SAMPLING, "End before this text; may be repeated.", show_default=False),
]


@dataclass(frozen=True)
class Place:
    """Which model, and where it runs."""

    model: Model = "demo"
    cache: CacheMode = "native"
    context: Context = None
    backend: BackendName = "auto"
    device: Device = "auto"
    gpus: Gpus = 1
    gpu_memory: GpuMemory = None

    def where(self) -> dict[str, Any]:
        """All but the model."""
        return {name: value for name, value in vars(self).items() if name != "model"}


@dataclass(frozen=True)
class Random:
    """A model of random weights."""

    synthetic: SyntheticModel = None
    recipe: Recipe = "native"
    unique_layers: UniqueLayers = "all"
    routing: Routing = "uniform"

    def model(self, other: str | None = None) -> "Synthetic | None":
        """The one that was asked for, if one was.

        other  --model of a command that runs either; None for ds4 bench, whose --recipe also names
               the results of a model that is no random one

        Raises BadParameter for an option that would do nothing.
        """
        if self.synthetic is None:
            self._refuse_companions(other is not None)
            return None
        if other not in (None, "demo"):
            raise typer.BadParameter("give it or --synthetic, not both", param_hint="--model")
        from ..loader import Synthetic

        if self.unique_layers != "all" and not self.unique_layers.isdecimal():
            raise typer.BadParameter("a number or all", param_hint="--unique-layers")
        unique = None if self.unique_layers == "all" else int(self.unique_layers)
        return Synthetic(self.synthetic, self.recipe, unique, self.routing)

    def _refuse_companions(self, recipe: bool) -> None:
        for field in fields(self):
            given = getattr(self, field.name) != field.default
            if given and (recipe or field.name != "recipe"):
                option = "--" + field.name.replace("_", "-")
                raise typer.BadParameter("it needs --synthetic", param_hint=option)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, where the model's own way is not meant."""

    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    min_p: MinP = None
    repetition_penalty: RepetitionPenalty = None
    presence_penalty: PresencePenalty = None
    frequency_penalty: FrequencyPenalty = None
    seed: Seed = None
    stop: Stop = None

    def given(self, **more: Any) -> dict[str, Any]:
        """What was given, and more of it; wrong values fail here, before a model is loaded."""
        from ..sampler import SamplingParams

        chosen = {name: x for name, x in (vars(self) | more).items() if x is not None}
        chosen |= {"stop": tuple(self.stop)} if self.stop else {}
        SamplingParams(**chosen)
        return chosen


def load(place: Place, random: "Synthetic | None" = None, speculate: Any = "off") -> "LLM":
    """Load a model, or make one, with a progress bar for people who have to wait."""
    import ds4

    p = place
    how = p.backend, p.device, p.cache, p.context
    with loading_bar() as progress:
        more: dict[str, Any] = {"progress": progress, "gpus": p.gpus, "gpu_memory": p.gpu_memory}
        if random is None:
            llm = ds4.load(p.model, *how, speculate=speculate, **more)
        else:
            from ..loader import load_synthetic

            llm = load_synthetic(random, *how, **more)
    for extra in llm.unused if sys.stderr.isatty() else ():
        size = f"{extra.count} tensors, {extra.nbytes / 1e6:,.1f} MB"
        if extra.kind == "unknown":
            note = f"note: the model has no use for {size} of this checkpoint"
        elif speculate in ("mtp", "auto"):
            continue
        else:
            note = f"note: --speculate mtp would use the {extra.kind} drafter ({size})"
        console(stderr=True).print(note, style="dim", highlight=False)
    return llm
