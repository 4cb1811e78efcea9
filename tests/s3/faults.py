"""A proxy before an S3 server that does to replies what networks and busy servers do.

Bytes pass as they are, the Host header too, so that signatures stay valid.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

PIECE_BYTES = 65536
SLOW_DOWN = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>'


@dataclass(frozen=True)
class Plan:
    """What happens to replies. What the n-th reply meets follows from (seed, n).

    Attributes:
        busy: share of requests that the proxy answers itself, with 503 SlowDown.
        truncated: share of bodies that end early, at a random place, with an orderly end of the connection.
        reset: share of bodies that end early, at a random place, with a reset of the connection.
        stalls: so many bodies stop in the middle for `stall_s` seconds and go on.
        smallest: bodies of fewer bytes are never touched.
    """

    seed: int = 0
    busy: float = 0.0
    truncated: float = 0.0
    reset: float = 0.0
    stalls: int = 0
    stall_s: float = 5.0
    smallest: int = 4096


class _Head(NamedTuple):
    """The first line and headers of a message, as they came and by name."""

    raw: bytes
    first: list[str]
    headers: dict[str, str]


class _Over(Exception):
    """This connection is at its end."""


class FaultProxy:
    """A proxy in a thread of its own; a context manager.

    Attributes:
        url: what clients take for the server's address.
        plan: what happens from the next reply on.
        before_cut: called when a body has come to the place where it ends early, before the client is told.
        done: how often each fault (busy, truncated, reset, stalled, dropped, unreachable) has happened.
        statuses: replies of the server itself, by status.
    """

    def __init__(self, upstream: str, plan: Plan = Plan()) -> None:
        self._upstream = (urlsplit(upstream).hostname, urlsplit(upstream).port)
        self.plan = plan
        self.before_cut: Callable[[], None] | None = None
        self.done: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self._replies = 0
        self._port = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self.admit()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def refuse(self) -> None:
        """Drop all connections, and refuse new ones from now on."""
        self._run(self._close())

    def admit(self) -> None:
        """Listen, at the same address as before."""
        self._run(self._listen())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        connections = list(self._connections)
        self.done["dropped"] += len(connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None
        await asyncio.sleep(0.01)  # sockets are closed by callbacks

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = self._loop.create_task(self._serve(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind: asyncio.StreamWriter | None = None
        writer.transport.set_write_buffer_limits(0)  # what was written has left before the next fault
        try:
            try:
                replies, behind = await asyncio.open_connection(*self._upstream)
            except OSError:
                self.done["unreachable"] += 1
                await _reset(writer)
            while True:
                await self._exchange(reader, writer, replies, behind)
        except (_Over, OSError, asyncio.IncompleteReadError):
            pass
        finally:
            for end in (writer, behind):
                if end is not None:
                    end.close()

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        replies: asyncio.StreamReader,
        behind: asyncio.StreamWriter,
    ) -> None:
        request = await _head(reader)
        plan, draw = self.plan, random.Random(f"{self.plan.seed}/{self._replies}")
        self._replies += 1
        size = int(request.headers.get("content-length", 0))
        if draw.random() < plan.busy:
            self.done["busy"] += 1
            await reader.readexactly(size)
            start = f"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: {len(SLOW_DOWN)}\r\n\r\n"
            writer.write(start.encode() + (b"" if request.first[0] == "HEAD" else SLOW_DOWN))
            return await writer.drain()
        behind.write(request.raw)
        await _pass(reader, behind, size)
        reply = await _head(replies)
        self.statuses[int(reply.first[1])] += 1
        writer.write(reply.raw)
        if request.first[0] == "HEAD" or reply.first[1] in ("204", "304"):
            return await writer.drain()
        if reply.headers.get("transfer-encoding", "").lower() == "chunked":
            return await _pass_chunked(replies, writer)
        size = int(reply.headers["content-length"])
        fault = self._fault(plan, draw) if size >= plan.smallest else None
        at = draw.randrange(size) if fault else size
        await _pass(replies, writer, at)
        if fault in ("truncated", "reset") and self.before_cut:
            await self._loop.run_in_executor(None, self.before_cut)
        if fault == "stalled":
            await asyncio.sleep(plan.stall_s)
            await _pass(replies, writer, size - at)
        elif fault == "reset":
            await _reset(writer)
        elif fault == "truncated":
            raise _Over
        return None

    def _fault(self, plan: Plan, draw: random.Random) -> str | None:
        where = draw.random()
        if self.done["stalled"] < plan.stalls:
            fault = "stalled"
        elif where < plan.truncated:
            fault = "truncated"
        elif where < plan.truncated + plan.reset:
            fault = "reset"
        else:
            return None
        self.done[fault] += 1
        return fault


async def _head(reader: asyncio.StreamReader) -> _Head:
    raw = await reader.readuntil(b"\r\n\r\n")
    first, *lines = raw.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return _Head(raw, first.split(" ", 2), {name.lower(): value.strip() for name, _, value in pairs})


async def _pass(source: asyncio.StreamReader, target: asyncio.StreamWriter, size: int) -> None:
    while size:
        piece = await source.read(min(size, PIECE_BYTES))
        if not piece:
            raise _Over
        target.write(piece)
        await target.drain()
        size -= len(piece)
    await target.drain()


async def _pass_chunked(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while True:
        line = await source.readuntil(b"\r\n")
        target.write(line)
        size = int(line.partition(b";")[0], 16)
        await _pass(source, target, size + 2)
        if size == 0:
            return


async def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST rather than FIN."""
    await writer.drain()
    found = writer.get_extra_info("socket")
    found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    raise _Over
