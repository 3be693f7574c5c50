"""Downloading a checkpoint from a model hub into the hub client's own cache.

Only what a model needs is fetched; the hub's Python files are text to read here, and never run.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import Ds4Error

NEEDED = [
    "config.json",
    "generation_config.json",
    "manifest.json",
    "tokenizer*.json",
    "encoding/*.py",
    "*.safetensors",
    "*.safetensors.index.json",
]
NOT_NEEDED = ["*/*.safetensors", "*/*.safetensors.index.json"]
ATTEMPTS = 5  # in a row that bring nothing
_MARGIN = 1 << 28  # bytes left free on the disk
_PART = ".incomplete"
_STALE = 600  # seconds after which nobody writes to a part any more


class DownloadError(Ds4Error):
    """A model cannot be downloaded: the hub, the network or the disk is in the way."""


@dataclass(frozen=True)
class RemoteFile:
    """A file that a model needs."""

    name: str
    nbytes: int
    cached: bool


@dataclass(frozen=True)
class Survey:
    """What a download would bring, and what of it is here."""

    hub_id: str
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def missing(self) -> int:
        """Bytes still to be downloaded; parts of files count as missing."""
        return sum(file.nbytes for file in self.files if not file.cached)


def survey(hub_id: str, revision: str | None = None) -> Survey:
    """List the files that a model needs, with their sizes. Raises DownloadError."""
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=NEEDED,
            ignore_patterns=NOT_NEEDED,
            dry_run=True,
        )
    except Exception as error:
        raise explain(error, hub_id, revision) from error
    files = tuple(
        RemoteFile(one.filename, one.file_size or 0, not one.will_download)
        for one in sorted(found, key=lambda one: one.filename)
    )
    names = {file.name for file in files}
    for name, there in (
        ("config.json", "config.json" in names),
        ("*.safetensors", any(name.endswith(".safetensors") for name in names)),
    ):
        if not there:
            raise DownloadError(f"{hub_id}: has no {name}; give the hub id of a checkpoint")
    return Survey(hub_id, found[0].commit_hash, files)


def download(
    found: Survey, pause: float = 1.0, report: Callable[[str], None] | None = None
) -> Path:
    """Download what a survey found, or the rest of it; returns the folder. Raises DownloadError.

    A file goes on after a dropped connection; whole files are kept for another call. Attempts that
    fail are repeated, at first after `pause` seconds, and `report` is told.
    """
    import huggingface_hub

    remove_stale_parts(found.hub_id)
    _check_disk(found)
    failures, before = 0, cached_bytes(found.hub_id)
    while True:
        try:
            folder = huggingface_hub.snapshot_download(
                found.hub_id,
                revision=found.commit,
                allow_patterns=NEEDED,
                ignore_patterns=NOT_NEEDED,
            )
            return Path(folder)
        except Exception as error:
            clear = explain(error, found.hub_id, found.commit)
            now = cached_bytes(found.hub_id)
            failures = 1 if now > before else failures + 1
            before = now
            if clear.lasting or failures >= ATTEMPTS:
                raise clear from error
            if report is not None:
                report(f"{clear.cause}; trying again")
            time.sleep(pause * 2 ** (failures - 1))


def pin(found: Survey, revision: str | None) -> None:
    """Let the revision's name lead to what was downloaded, also without a network."""
    from huggingface_hub import constants

    refs = _cache_folder(found.hub_id) / "refs"
    refs.mkdir(parents=True, exist_ok=True)
    (refs / (revision or constants.DEFAULT_REVISION)).write_text(found.commit)


# the disk


def cache_root() -> Path:
    """Where the hub client keeps what it downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _cache_folder(hub_id: str) -> Path:
    return cache_root() / f"models--{hub_id.replace('/', '--')}"


def cached_bytes(hub_id: str) -> int:
    """Bytes of a model's whole files in the cache."""
    blobs = (_cache_folder(hub_id) / "blobs").glob("*")
    return sum(path.stat().st_size for path in blobs if path.suffix != _PART)


def remove_stale_parts(hub_id: str) -> None:
    """Remove parts of files that a killed download left: the hub client makes no use of them."""
    for path in (_cache_folder(hub_id) / "blobs").glob(f"*{_PART}"):
        if time.time() - path.stat().st_mtime > _STALE:
            path.unlink(missing_ok=True)


def _check_disk(found: Survey) -> None:
    root = cache_root()
    while not root.exists():
        root = root.parent
    parts = sum(
        path.stat().st_size for path in _cache_folder(found.hub_id).glob("blobs/*.incomplete")
    )
    need, free = max(0, found.missing - parts) + _MARGIN, shutil.disk_usage(root).free
    if found.missing and free < need:
        raise DownloadError(
            f"{cache_root()}: {found.hub_id} needs {need / 1e9:.1f} GB more, the disk has "
            f"{free / 1e9:.1f} GB free; make room, or set HF_HOME to a folder on another disk"
        )


# errors


class _Clear(DownloadError):
    """An error of the hub client in plain words; `lasting` if trying again is in vain."""

    def __init__(self, hub_id: str, cause: str, remedy: str, lasting: bool) -> None:
        super().__init__(f"{hub_id}: {cause}; {remedy}")
        self.cause, self.lasting = cause, lasting


def explain(error: BaseException, hub_id: str, revision: str | None = None) -> _Clear:
    """What an error of the hub client means, and what helps."""
    from huggingface_hub import constants, errors

    chain = list(_chain(error))
    lasting: list[tuple[type[BaseException], str, str]] = [
        (
            errors.GatedRepoError,
            "is gated",
            f"accept its terms on {constants.ENDPOINT}/{hub_id}, then run: hf auth login",
        ),
        (errors.RevisionNotFoundError, f"has no revision {revision}", "check --revision"),
        (
            errors.RepositoryNotFoundError,
            f"is not on {constants.ENDPOINT}, or is private",
            "check the id; for a private model run: hf auth login",
        ),
        (errors.HFValidationError, "is no hub id", "it should look like owner/model"),
        (
            errors.OfflineModeIsEnabled,
            "cannot be downloaded: HF_HUB_OFFLINE is set",
            "unset it and run again",
        ),
    ]
    for kind, cause, remedy in lasting:
        if any(isinstance(one, kind) for one in chain):
            return _Clear(hub_id, cause, remedy, True)
    if any(_disk_full(one) for one in chain):
        remedy = "make room, or set HF_HOME to a folder on another disk; then run again"
        return _Clear(hub_id, f"{cache_root()}: the disk is full", remedy, True)
    for one in chain:
        status = getattr(getattr(one, "response", None), "status_code", None)
        if status is not None:
            remedy = "wait a little and run again: what is here is kept"
            cause = f"{constants.ENDPOINT} answered with status {status}"
            return _Clear(hub_id, cause, remedy, 400 <= status < 500 and status not in (408, 429))
    what = " ".join(str(chain[-1]).split()) or type(chain[-1]).__name__
    cause = f"{constants.ENDPOINT} cannot be reached, or the connection broke ({what[:200]})"
    return _Clear(hub_id, cause, "check the network and run again: what is here is kept", False)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return os.strerror(errno.ENOSPC).lower() in str(error).lower()
