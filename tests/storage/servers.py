"""Small HTTP servers that misbehave as object stores do: bodies that break, objects that change, errors that pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@dataclass
class Mood:
    """What the server does next, and what it has done.

    Attributes:
        broken_bodies: so many bodies end half-way (the connection closes).
        busy: so many requests get a 503.
        changes_after: the object's ETag changes after so many bodies; None for never.
    """

    content: bytes
    broken_bodies: int = 0
    busy: int = 0
    changes_after: int | None = None
    bodies: int = 0
    requests: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def tag(self) -> str:
        return '"second"' if self.changes_after is not None and self.bodies >= self.changes_after else '"first"'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    mood: Mood

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        mood = self.mood
        with mood.lock:
            mood.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
            tag = mood.tag
            if mood.busy:
                mood.busy -= 1
                return self._empty(503)
            wanted = self.headers.get("If-Match")
            if wanted is not None and wanted != tag:
                return self._empty(412)
            cut = body and mood.broken_bodies > 0
            mood.broken_bodies -= cut
            mood.bodies += body
        self._send(tag, body=body, cut=cut)
        return None

    def _empty(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, tag: str, *, body: bool, cut: bool) -> None:
        content, size = self.mood.content, len(self.mood.content)
        asked = self.headers.get("Range")
        start, end = 0, size - 1
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or end), end)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        self.send_header("Content-Length", str(end + 1 - start))
        self.send_header("ETag", tag)
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.end_headers()
        if body:
            part = content[start : end + 1]
            self.wfile.write(part[: len(part) // 2] if cut else part)
        self.close_connection = cut


@contextmanager
def server_of(mood: Mood) -> Iterator[str]:
    """A server on a free port of this machine; yields its http:// root."""
    handler = type("Handler", (_Handler,), {"mood": mood})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"


def use_s3(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
