"""Workloads: what is asked, how much of it at once, and when enough was measured.

They are read from a TOML file, so that every engine is measured with the same one. Lists of
`concurrency` and `rate` make a workload each.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from math import inf
from pathlib import Path
from typing import Any, Literal

from ..errors import BenchError

Kind = Literal["closed", "poisson", "agent"]
PACKAGED = "standard", "quick"


@dataclass(frozen=True)
class Workload:
    """One way to load a model.

    kind     "closed" keeps `concurrency` requests in flight; "poisson" sends `rate` a second
             whatever comes back; "agent" keeps `concurrency` conversations of `turns` turns, each
             turn a new question of `prompt_tokens` after all that was said before
    requests, seconds
             the least to measure, both; `most_seconds` starts nothing after it
    prefill  measure the prompts alone first, to tell their energy from that of the output
    ttft_s, tpot_s
             limits that a request must keep to count as good
    """

    name: str
    kind: Kind = "closed"
    prompt_tokens: int = 512
    output_tokens: int = 512
    concurrency: int = 1
    requests: int = 4
    seconds: float = 60.0
    most_seconds: float = 600.0
    prefill: bool = False
    rate: float = 1.0
    turns: int = 4
    shared_tokens: int = 0  # of an agent's first prompt, the same in every conversation
    ttft_s: float | None = None
    tpot_s: float | None = None
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("closed", "poisson", "agent"):
            raise ValueError(f"kind must be closed, poisson or agent, not {self.kind!r}")
        for field in ("prompt_tokens", "output_tokens", "concurrency", "requests", "turns"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1")
        if not (0 < self.rate < inf and self.most_seconds > 0 and 0 <= self.seconds < inf):
            raise ValueError("rate and most_seconds must be above 0, seconds not below")

    @property
    def key(self) -> str:
        """What must be equal for two results to be compared: all but how long was measured."""
        content = asdict(self)
        for free in ("name", "requests", "seconds", "most_seconds", "prefill"):
            del content[free]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def context(self) -> int:
        """Tokens that the longest of its requests needs."""
        turns = self.turns if self.kind == "agent" else 1
        return self.shared_tokens + turns * (self.prompt_tokens + self.output_tokens)

    def only_prompts(self) -> "Workload":
        """The same prompts, with one token of output each."""
        return replace(self, name=f"{self.name} prefill", output_tokens=1, prefill=False)


def read_workloads(source: str | Path, only: Iterable[str] = ()) -> list[Workload]:
    """Those of a packaged name ("standard", "quick") or of a file; `only` some of their names.

    Raises BenchError naming the file and the workload.
    """
    if str(source) in PACKAGED:
        text = (resources.files("ds4.bench") / f"{source}.toml").read_text("utf-8")
    else:
        try:
            text = Path(source).read_text("utf-8")
        except OSError as error:
            raise BenchError(f"{source}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise BenchError(f"{source}: is not UTF-8: {error.reason}; save it so") from error
    try:
        tables = tomllib.loads(text).get("workload", [])
        found = [one for table in tables for one in _expanded(table)]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BenchError(f"{source}: {error}") from error
    return _chosen(found, source, list(only))


def _chosen(found: list[Workload], source: str | Path, only: list[str]) -> list[Workload]:
    names = [one.name for one in found]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if not found or doubled:
        raise BenchError(
            f"{source}: " + (f"{doubled} is there twice" if doubled else "no [[workload]]")
        )
    unknown = [name for name in only if name not in (*names, *(n.split("@")[0] for n in names))]
    if unknown:
        raise BenchError(f"{source}: no workload is called {unknown[0]}: {', '.join(names)}")
    return [one for one in found if not only or one.name in only or one.name.split("@")[0] in only]


def _expanded(table: dict[str, Any]) -> Iterator[Workload]:
    known = {field.name for field in fields(Workload)}
    name = table.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError("a workload needs a name")
    unknown = sorted(set(table) - known)
    if unknown:
        raise ValueError(f"workload {name}: no field is called {unknown[0]}")
    lists = [key for key, value in table.items() if isinstance(value, list)]
    if not set(lists) <= {"concurrency", "rate"} or len(lists) > 1:
        raise ValueError(f"workload {name}: one list at most, of concurrency or rate")
    for value in table[lists[0]] if lists else [None]:
        chosen = table | ({lists[0]: value, "name": f"{name}@{value}"} if lists else {})
        try:
            yield Workload(**chosen)
        except (ValueError, TypeError) as error:
            raise ValueError(f"workload {chosen['name']}: {error}") from error
