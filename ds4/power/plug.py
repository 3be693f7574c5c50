"""A smart plug on the network: the whole machine at the wall."""

import httpx

from ..errors import PowerError
from .source import Reading, Scope

_TIMEOUT_S = 0.8  # shorter than a reading may take: a silent plug is a fault, not a delay


class ShellyPlug:
    """A Shelly of generation 2 or later, by its HTTP interface and without a password.

    Its watts are integrated. Its own counter is left alone: how often that takes a new value is
    not documented, and the edges of a window are only known that well.
    """

    scope: Scope = "wall"
    part = "system"
    interval_s = 0.5
    refresh_s = 1.0
    wrap_j: float | None = None

    def __init__(self, address: str, channel: int = 0) -> None:
        address = address if "://" in address else f"http://{address}"
        self.name = f"shelly:{address.partition('://')[2].rstrip('/')}"
        self._url = f"{address.rstrip('/')}/rpc/Switch.GetStatus"
        self._channel = channel
        self._client = httpx.Client(timeout=_TIMEOUT_S, trust_env=False)
        try:
            self.read()
        except PowerError:
            self.close()
            raise

    def read(self) -> Reading:
        try:
            answer = self._client.get(self._url, params={"id": self._channel})
            answer.raise_for_status()
            return Reading(watts=float(answer.json()["apower"]))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PowerError(f"{self.name}: {what}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise PowerError(f"{self.name}: the answer has no number called apower") from error

    def close(self) -> None:
        self._client.close()
