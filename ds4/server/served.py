"""The models behind one server, and what all their requests share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import deepseek_recipe as recipe

from ..chat import Profile, detect_profile
from ..engine.api import Finished
from ..errors import CheckpointError
from ..tokenizer import Tokenizer
from .client import EngineClient
from .errors import ApiError
from .prompt import PromptEncoder
from .replay import Replays
from .schema import GrammarCheck
from .store import ResponseStore

MAX_NAME = 256


@dataclass(frozen=True)
class Settings:
    """
    keepalive_s      a stream that is silent for so long says that it lives
    progress_s       how often a stream tells of a prompt under way, at most
    client_sampling  while thinking, too, the client's temperature and penalties count; DeepSeek's
                     own service ignores them there
    grammar_s        time for the check of a schema
    timings          more figures for a response's timings, such as joules
    """

    keepalive_s: float = 10.0
    progress_s: float = 1.0
    client_sampling: bool = False
    grammar_s: float = 2.0
    timings: Callable[[Finished], Mapping[str, float]] | None = None


class ServedModel:
    """An engine with the words of its model."""

    def __init__(
        self, client: EngineClient, tokenizer_file: Path | str, profile: Profile = "preview"
    ) -> None:
        """Raises CheckpointError if the tokenizer cannot be read."""
        self.client, self.profile = client, profile
        self.tokenizer = Tokenizer.from_file(tokenizer_file)
        self.replays = Replays()
        self.encoder = PromptEncoder(self.tokenizer, profile, self.replays)
        self._file = Path(tokenizer_file)

    @classmethod
    def from_folder(cls, client: EngineClient, folder: Path | str) -> "ServedModel":
        """With the tokenizer and the release of the checkpoint in `folder`."""
        folder = Path(folder)
        return cls(client, folder / "tokenizer.json", detect_profile(folder))

    @property
    def name(self) -> str:
        return self.client.model.name

    @cached_property
    def recipe_tokenizer(self) -> Any:
        """The tokenizer as deepseek-recipe reads it, to decode what is sampled."""
        try:
            return recipe.Tokenizer.from_file(str(self._file))
        except Exception as error:  # the library names no type
            raise CheckpointError(f"{self._file}: not a usable tokenizer.json: {error}") from error


class Served:
    """All that the endpoints need."""

    def __init__(self, models: Sequence[ServedModel], settings: Settings) -> None:
        self.models = {model.name: model for model in models}
        self.settings = settings
        self.grammars = GrammarCheck()
        self.responses = ResponseStore()

    def pick(self, name: object) -> ServedModel:
        """The model of a request. A server of one model is not fussy about its name."""
        if not isinstance(name, str) or len(name) > MAX_NAME:  # every event repeats it
            raise ApiError(400, "model must be the name of a model", param="model")
        if name in self.models:
            return self.models[name]
        if len(self.models) == 1:
            return next(iter(self.models.values()))
        known = ", ".join(self.models)
        raise ApiError(
            404,
            f"no model is called {name!r}: there are {known}",
            param="model",
            code="model_not_found",
        )
