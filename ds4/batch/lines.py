"""Requests of a batch file, and what is answered to them, line by line."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Ds4Error

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


class BatchError(Ds4Error):
    """A batch file that cannot be read or written."""


@dataclass(frozen=True)
class Job:
    """A line of the input. `fault` says why it cannot be run, as an OpenAI error object."""

    number: int  # of the line, from 1
    custom_id: str | None
    url: str
    body: Mapping[str, Any]
    fault: Mapping[str, Any] | None = None
    digest: str = ""

    @property
    def id(self) -> str:
        """The same for the same line in every run."""
        return f"batch_req_{self.number:06d}_{self.digest}"


def read_jobs(path: Path) -> list[Job]:
    """Every line that is not empty. Raises BatchError if the file cannot be read."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BatchError(f"{path}: cannot be read: {error.strerror}") from error
    first: dict[str, int] = {}
    lines = enumerate(raw.split(b"\n"), 1)
    return [_job(number, line, first) for number, line in lines if line.strip()]


def _job(number: int, line: bytes, first: dict[str, int]) -> Job:
    digest = hashlib.sha256(line).hexdigest()[:12]
    try:
        said = json.loads(line, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        said, why = None, f"is not JSON: {error}"
    else:
        why = "is not a JSON object"
    if not isinstance(said, dict):
        fault: dict[str, Any] | None = _fault("invalid_json_line", f"line {number} {why}")
        return Job(number, None, "", {}, fault, digest)
    name, url, body = said.get("custom_id"), said.get("url"), said.get("body")
    known = name if isinstance(name, str) else None
    fault = _wrong(number, said, first)
    if known is not None:
        first.setdefault(known, number)
    if fault is not None:
        return Job(number, known, "", {}, fault, digest)
    assert isinstance(url, str)
    assert isinstance(body, dict)
    return Job(number, known, url, body, None, digest)


def _finite(text: str) -> float:
    """JSON knows no NaN and no infinity, which 1e999 becomes; ValueError."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _wrong(number: int, said: Mapping[str, Any], first: Mapping[str, int]) -> dict[str, Any] | None:
    name, body = said.get("custom_id"), said.get("body")
    if not isinstance(name, str):
        return _fault("invalid_request", f"line {number}: custom_id must be a string")
    if name in first:
        text = f"line {number}: custom_id {name!r} is that of line {first[name]} already"
        return _fault("duplicate_custom_id", text)
    if said.get("method", "POST") != "POST":
        return _fault("invalid_method", f"line {number}: method must be POST")
    if said.get("url") not in URLS:
        return _fault("invalid_url", f"line {number}: url must be one of {', '.join(URLS)}")
    if not isinstance(body, dict):
        return _fault("invalid_request", f"line {number}: body must be an object")
    if body.get("stream"):
        return _fault("invalid_request", f"line {number}: stream cannot be set in a batch")
    return None


def _fault(code: str, message: str) -> dict[str, Any]:
    return {"code": code, "message": message}


def answered(job: Job, status: int, request_id: str, body: Any) -> dict[str, Any]:
    """A line of the output: what the endpoint said, be it an error."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": job.id, "custom_id": job.custom_id, "response": response, "error": None}


def refused(job: Job) -> dict[str, Any]:
    """A line of the output for a line of the input that cannot be run."""
    return {"id": job.id, "custom_id": job.custom_id, "response": None, "error": job.fault}


def failed(job: Job, code: str, message: str) -> dict[str, Any]:
    """A line of the output for a request that could not be carried out."""
    return answered(job, 500, "", {"error": {"message": message, "code": code}})


def succeeded(line: Mapping[str, Any]) -> bool:
    response = line.get("response")
    return isinstance(response, Mapping) and response.get("status_code") == 200
