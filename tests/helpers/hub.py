"""A model hub on this machine that serves folders as repositories, for the real client library."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves ROOT/owner/name as repositories.

    Args:
        root: of the folders.

    Attributes:
        requests: method, path and range of every request.
        breaks_off: ends of the paths of files whose first transfer ends in the middle.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.root, self.requests, self.breaks_off = root, list[str](), set[str]()

    @property
    def address(self) -> str:
        """The endpoint for the client library."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Stay quiet: clients break off too."""


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, wanted = self.path.split("?")[0], self.headers.get("Range", "")
        self.server.requests.append(f"{self.command} {path} {wanted}".strip())
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?(/tree/.+)?", path)
        content = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if listing and (self.server.root / listing[1]).is_dir():
            self._answer(200, self._listing(self.server.root / listing[1], tree=bool(listing[2])))
        elif content and (self.server.root / content[1] / content[2]).is_file():
            self._send_file(self.server.root / content[1] / content[2], wanted)
        else:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound" if content else "RepoNotFound"})

    def _listing(self, folder: Path, *, tree: bool) -> bytes:
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        if tree:
            entries = [{"type": "file", "path": name, "oid": _hash(path)[:40]} for name, path in files.items()]
            return json.dumps([entry | {"size": files[entry["path"]].stat().st_size} for entry in entries]).encode()
        siblings = [{"rfilename": name, "size": path.stat().st_size} for name, path in files.items()]
        return json.dumps({"id": "x/y", "sha": COMMIT, "siblings": siblings}).encode()

    def _send_file(self, path: Path, wanted: str) -> None:
        body, start = path.read_bytes(), int(wanted[6:].partition("-")[0] or 0)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_hash(path)}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self._answer(206 if start else 200, body[start:], headers, path.as_posix())

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, name: str = "") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if broken := {end for end in self.server.breaks_off if name.endswith(end)}:
            self.server.breaks_off -= broken
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """Context in which a hub serves the folders below `root`."""
    hub = Hub(root)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
