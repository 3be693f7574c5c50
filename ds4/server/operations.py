"""What is asked about the server itself: is it alive, is it ready, its figures, its page."""

from collections.abc import Awaitable, Callable
from importlib import resources

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .answers import App, Receive, Scope, Send
from .pool import Pool

Endpoint = Callable[[Request], Awaitable[Response]]

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/stream.js": ("stream.js", "text/javascript"),
}


class Operations:
    """An ASGI layer with the routes below; the rest goes on to the API."""

    def __init__(self, api: App, pool: Pool, registry: CollectorRegistry) -> None:
        self._api, self._pool, self._registry = api, pool, registry
        self._endpoints: dict[str, Endpoint] = {
            "/health": self._health,
            "/ready": self._ready,
            "/metrics": self._metrics,
        }
        self._files = {path: _read(name) for path, (name, _) in _PAGE.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return await self._api(scope, receive, send)
        path = scope["path"]
        if path in self._endpoints:
            response = await self._endpoints[path](Request(scope, receive))
        elif path in _PAGE:
            kind = _PAGE[path][1]
            headers = {"content-security-policy": _POLICY, "cache-control": "no-cache"}
            response = Response(self._files[path], media_type=kind, headers=headers)
        else:
            return await self._api(scope, receive, send)
        return await response(scope, receive, send)

    async def _health(self, request: Request) -> Response:
        """200 as long as the server lives, whatever the engine does."""
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        """200 when a request would run now; else 503, when to ask again, and how far it is."""
        active = self._pool.active
        if active.ready:
            return JSONResponse({"status": "ready"})
        done, total = active.loading
        about = {"status": active.state, "loaded": round(done / total, 3) if total else 0.0}
        return JSONResponse(about, 503, {"retry-after": "5"})

    async def _metrics(self, request: Request) -> Response:
        text = generate_latest(self._registry)
        return Response(text, headers={"content-type": CONTENT_TYPE_PLAIN_1_0_0})


def _read(name: str) -> bytes:
    return (resources.files("ds4.server") / "page" / name).read_bytes()
