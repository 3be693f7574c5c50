"""Who may speak to the server: the first layer, before any route is looked up.

All is denied but what is named: two paths need no key, and a path is taken as it was sent.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import Ds4Error
from .answers import App, Message, Receive, Scope, Send, header, refuse

OPEN = frozenset({"/health", "/ready"})
SHORTEST_KEY = 16

# The browser's part: nothing here may be framed, sniffed, cached or read by other sites.
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_DEFAULTS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)


class SecurityError(Ds4Error):
    """The server would be open to others, or its keys cannot be used."""


class Keys:
    """API keys, of which only hashes are kept. Without any, everyone is let in."""

    def __init__(self, keys: Iterable[str] = (), file: Path | None = None) -> None:
        self._given, self._file = tuple(keys), file
        self._digests: tuple[bytes, ...] = ()
        self.reload()

    def __bool__(self) -> bool:
        return bool(self._digests)

    def reload(self) -> None:
        """Read the file again. Raises SecurityError, and then what was known stays valid."""
        keys = [*self._given, *(_read_keys(self._file) if self._file else ())]
        for key in keys:
            if len(key) < SHORTEST_KEY or not key.isascii():
                where = f"{self._file}: " if self._file else ""
                raise SecurityError(
                    f"{where}an API key has fewer than {SHORTEST_KEY} characters, or others than "
                    "ASCII: make one with `openssl rand -hex 32`"
                )
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def owner(self, key: bytes) -> str | None:
        """A name for the holder of a key, safe to log; None for a wrong one."""
        digest, found = hashlib.sha256(key).digest(), None
        for known in self._digests:  # all of them: how long it takes tells nothing
            if hmac.compare_digest(digest, known):
                found = known
        return found.hex()[:8] if found else None


def _read_keys(file: Path) -> list[str]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SecurityError(f"{file}: the API keys cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise SecurityError(f"{file}: no API key is in it: write one a line")
    return keys


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(host: str, keys: Keys) -> None:
    """Raises SecurityError if others could use the server without a key."""
    if not keys and not is_loopback(host):
        raise SecurityError(
            f"--host {host} lets other machines in, and there is no API key: give --api-key-file "
            "or set DS4_API_KEY, or stay on 127.0.0.1"
        )


class Hosts:
    """The names under which the server may be addressed: a page elsewhere cannot lend it another.

    On an address that others reach, any IP address will do: those cannot be rebound.
    """

    def __init__(self, bound: str, more: Sequence[str] = ()) -> None:
        own = [] if is_loopback(bound) else [socket.gethostname(), f"{socket.gethostname()}.local"]
        self._names = {name.lower() for name in ("localhost", bound, *own, *more)}
        self._addresses = not is_loopback(bound)

    def __contains__(self, host: bytes | None) -> bool:
        name = _without_port((host or b"").decode("latin-1").lower())
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._addresses or address.is_loopback


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


class Guard:
    """The ASGI layer: path, host, origin, key. What passes has `owner` in its state."""

    def __init__(self, app: App, keys: Keys, hosts: Hosts) -> None:
        self._app, self._keys, self._hosts = app, keys, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # no WebSockets here
            return None
        scope.setdefault("state", {})
        send = _hardened(send)
        if header(scope, b"host") not in self._hosts:
            return await refuse(send, 403, "this Host is not served here", close=True)
        if not _is_plain(scope):
            return await refuse(send, 404, "there is no such path", close=True)
        if not _is_own(scope):
            return await refuse(send, 403, "pages of other sites are not answered", close=True)
        owner = self._owner(scope)
        if owner is None and scope["path"] not in OPEN:
            page = scope["path"] == "/" and scope["method"] == "GET"
            challenge = b'Basic realm="ds4: any name, and the API key"' if page else b"Bearer"
            told = "give a valid API key, as `Authorization: Bearer` or `x-api-key`"
            return await refuse(send, 401, told, [(b"www-authenticate", challenge)], close=True)
        scope["state"]["owner"] = owner or "-"
        return await self._app(scope, receive, send)

    def _owner(self, scope: Scope) -> str | None:
        if not self._keys:
            return "-"
        found = [self._keys.owner(key) for key in _credentials(scope)]
        return found[0] if len(found) == 1 else None


def _credentials(scope: Scope) -> list[bytes]:
    """Every key that a request shows; more than one is a wrong one, unless they are equal."""
    shown = set()
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            shown.add(value.strip())
        elif name == b"authorization":
            scheme, _, rest = value.partition(b" ")
            if scheme.lower() == b"bearer":
                shown.add(rest.strip())
            elif scheme.lower() == b"basic":  # a browser that opens the page
                shown.add(_password(rest.strip()))
            else:
                shown.add(b"")
    return list(shown)


def _password(encoded: bytes) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _is_plain(scope: Scope) -> bool:
    """No path of ours is written with escapes, empty or dotted parts: those only deceive."""
    raw: bytes = scope.get("raw_path") or b""
    odd = (b"%", b"//", b"\\", b"/./", b"/../")
    return raw == scope["path"].encode() and raw.startswith(b"/") and not any(x in raw for x in odd)


def _is_own(scope: Scope) -> bool:
    """A browser names the page that asks; only our own may."""
    origins = [value for name, value in scope["headers"] if name == b"origin"]
    if not origins:
        return True
    host = (header(scope, b"host") or b"").lower()
    return len(origins) == 1 and origins[0].lower() in (b"http://" + host, b"https://" + host)


def _hardened(send: Send) -> Send:
    async def hardened(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            named = {name for name, _ in headers}
            message["headers"] = [
                *headers,
                *_HEADERS,
                *(pair for pair in _DEFAULTS if pair[0] not in named),
            ]
        await send(message)

    return hardened


def keys_from(file: Path | None) -> Keys:
    """The keys of a file and of the variable DS4_API_KEY. Raises SecurityError."""
    given = os.environ.get("DS4_API_KEY")
    return Keys([given] if given else [], file)
