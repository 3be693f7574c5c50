"""Options that several commands share, and the loading that they lead to."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .terminal import loading_bar

if TYPE_CHECKING:
    from ..llm import LLM

MODEL, RUN, SAMPLING = "Model", "Where it runs", "Sampling"


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


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
BackendName = Annotated[str, _option(RUN, "auto, reference, mlx or cuda.", "--backend", "-b")]
Device = Annotated[str, _option(RUN, "auto, cpu, or a device of the backend, such as cuda:1.")]

MaxTokens = Annotated[int, _option(SAMPLING, "Stop after so many tokens.", "--max-tokens", "-n")]
MaxAnswer = Annotated[
    int | None,
    _option(
        SAMPLING, "End an answer after so many tokens.", "--max-tokens", "-n", show_default=False
    ),
]
Temperature = Annotated[float, _option(SAMPLING, "0 takes the most likely token.", "--temperature")]
TopP = Annotated[float, _option(SAMPLING, "Only the likeliest that add up to this probability.")]
TopK = Annotated[int, _option(SAMPLING, "Only so many of the likeliest; 0 for all.")]
MinP = Annotated[float, _option(SAMPLING, "Only those this likely relative to the likeliest.")]
RepetitionPenalty = Annotated[float, _option(SAMPLING, "Divides what was there before.")]
PresencePenalty = Annotated[float, _option(SAMPLING, "Taken off what was said before, once.")]
FrequencyPenalty = Annotated[float, _option(SAMPLING, "Taken off for each time it was said.")]
Seed = Annotated[int | None, _option(SAMPLING, "The same seed, the same text.", show_default=False)]
Stop = Annotated[
    list[str] | None,
    _option(SAMPLING, "End before this text; may be repeated.", show_default=False),
]


def load(model: str, backend: str, device: str, cache: str, context: int | None) -> "LLM":
    """Load a model, with a progress bar for people who have to wait."""
    import ds4

    with loading_bar() as progress:
        return ds4.load(model, backend, device, cache, context, progress=progress)  # type: ignore[arg-type]
