"""A stand-in for a model hub on 127.0.0.1, which can drop connections and refuse."""

import hashlib
import json
import re
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HUB_ID, COMMIT = "someone/small-v4", "c0ffee" * 6 + "beef"


class Hub(ThreadingHTTPServer):
    """As much of a model hub as a download asks for.

    drops    GETs of each weight file that end in the middle
    denied   status of every GET of a weight file that would go on after a drop; 0 for none
    refusal  (status, error code) of every question about the model; None for none
    asked    (path, first byte) of each GET of a file
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.lock = folder, threading.Lock()
        self.drops, self.denied, self.refusal = 0, 0, None
        self.asked: list[tuple[str, int]] = []
        self.entry = cache(self.entry)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def entries(self) -> list[dict]:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [self.entry(path) for path in files]

    def entry(self, path: Path) -> dict:
        data = path.read_bytes()
        name, sha = str(path.relative_to(self.folder)), hashlib.sha256(data).hexdigest()
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "path": name, "size": len(data), "oid": oid}
        if path.suffix == ".safetensors":
            entry["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 134}
        return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{HUB_ID}"):
            self._tell(path)
        elif path.startswith(f"/{HUB_ID}/resolve/"):
            self._file(path.split("/", 5)[5], body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _tell(self, path: str) -> None:
        if self.server.refusal:
            status, code = self.server.refusal
            self._send(status, b'{"error": "no"}', {"X-Error-Code": code})
        elif "/tree/" in path:
            self._send(200, json.dumps(self.server.entries()).encode())
        elif "/revision/" in path and not path.endswith(("/main", COMMIT)):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            names = [{"rfilename": entry["path"]} for entry in self.server.entries()]
            info = {"_id": "1", "id": HUB_ID, "modelId": HUB_ID, "sha": COMMIT, "siblings": names}
            self._send(200, json.dumps(info).encode())

    def _file(self, name: str, body: bool) -> None:
        entry = self.server.entry(self.server.folder / name)
        data = (self.server.folder / name).read_bytes()
        found = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(found[1]) if found else 0
        etag = f'"{entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]}"'
        headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(len(data))}
        if found:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if not body:
            return self._send(200, data, headers, body=False)
        with self.server.lock:
            self.server.asked.append((name, start))
            times = sum(one == name for one, _ in self.server.asked)
        if self.server.denied and start:
            return self._send(self.server.denied, b"{}")
        cut = "lfs" in entry and times <= self.server.drops
        return self._send(206 if found else 200, data[start:], headers, cut=cut)

    def _send(
        self,
        status: int,
        data: bytes,
        headers: dict | None = None,
        body: bool = True,
        cut: bool = False,
    ) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(data)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            self.close_connection = True
