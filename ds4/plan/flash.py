"""The config of DeepSeek-V4-Flash as released (specification 1.1), to plan before a download."""

import json
from importlib import resources
from typing import Any

from ..config import Config


def flash_fields() -> dict[str, Any]:
    """config.json as released, parsed."""
    fields: dict[str, Any] = json.loads((resources.files("ds4.plan") / "flash.json").read_text())
    return fields


def flash() -> Config:
    """DeepSeek-V4-Flash: 284 B parameters, 256 experts a layer."""
    return Config.from_dict(flash_fields(), "flash")
