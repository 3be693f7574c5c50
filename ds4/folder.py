"""What a model's folder holds besides config.json and weights: its words, how it is sampled."""

from pathlib import Path
from typing import Any

from .chat import ChatEncoding, detect_profile
from .errors import ConfigError, PromptError
from .json_fields import need_regular, read_json
from .sampler import SamplingParams
from .tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """The sampling options of generation_config.json, if there is one. Raises ConfigError."""
    file = folder / "generation_config.json"
    if not file.exists():
        return {}
    remedy = "correct it or remove the file"
    need_regular(file, ConfigError, remedy)
    said = read_json(file, ConfigError, remedy)
    try:
        if not isinstance(said, dict):
            raise ValueError("should hold a JSON object")
        names = "temperature", "top_p", "top_k", "min_p", "repetition_penalty"
        chosen = {name: said[name] for name in names if said.get(name) is not None}
        for name, value in chosen.items():
            if type(value) not in ((int,) if name == "top_k" else (int, float)):
                raise ValueError(f"{name} should be a number, not {value!r:.40}")
        if said.get("do_sample") is False:
            chosen["temperature"] = 0.0
        SamplingParams(**chosen)
    except (ValueError, PromptError) as error:
        raise ConfigError(f"{file}: {error}; {remedy}") from error
    return chosen


def words(folder: Path) -> tuple[Tokenizer | None, ChatEncoding | None]:
    """The tokenizer and the chat encoding, if the folder has a tokenizer."""
    file = folder / TOKENIZER
    if not file.exists():
        return None, None
    return Tokenizer.from_file(file), ChatEncoding(file, detect_profile(folder))


def wordless(folder: Path) -> str:
    """Why a model without a tokenizer has none, and the remedy."""
    return f"{folder / TOKENIZER} is missing: put it there, or give token ids"
