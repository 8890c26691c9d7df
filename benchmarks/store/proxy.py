"""A proxy before an S3 server that makes it far away, and fails on demand.

python -m benchmarks.store.proxy PORT_OF_THE_SERVER --latency 0.02        prints the port that it listens at
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

Fault = Literal["500", "503", "lost", "reset", "silent", "slow", "cut", "short"]
"""500, 503: an error instead of the answer, the server never asked. lost: the server did it, its answer never came. reset: the
connection breaks before. silent: no answer, ever. slow: 100 bytes a second. cut: the connection breaks in the body.
short: half of the body, said to be all."""

SLOW_BYTES = 10
SLOW_SECONDS = 0.1
CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True)
class Request:
    """What a client asks. path: with the query."""

    method: str
    path: str


@dataclass
class Proxy:
    """Listens at `port` once it runs. latency: seconds before a request goes on. fault: what goes wrong with a request."""

    server: int
    latency: float = 0.0
    fault: Callable[[Request], Fault | None] = lambda _: None
    port: int = 0
    requests: list[Request] = field(default_factory=list)
    _connections: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self) -> asyncio.Server:
        """Listen at a free port."""
        listening = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=2**20)
        self.port = int(listening.sockets[0].getsockname()[1])
        return listening

    async def stop(self) -> None:
        """Break all connections."""
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            upstream = await asyncio.open_connection("127.0.0.1", self.server, limit=2**20)
            while await self._pass_on(reader, writer, *upstream):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            for end in (writer, *([upstream[1]] if upstream else [])):
                end.close()

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> bool:
        """One request and its answer. False: the connection is over."""
        head = await reader.readuntil(b"\r\n\r\n")
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        request = Request(method, path)
        self.requests.append(request)
        fault = self.fault(request)
        if self.latency:
            await asyncio.sleep(self.latency)
        if fault in ("reset", "silent"):
            return await _refuse(writer, fault)
        asked = _without_expect(head) if fault not in ("500", "503") else b""
        if b"expect: 100-continue" in head.lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        up_writer.write(asked)
        async for piece in _body(reader, head):
            if asked:
                up_writer.write(piece)
                await up_writer.drain()
        if fault in ("500", "503"):
            writer.write(_failure(fault, method == "HEAD"))
            await writer.drain()
            return True
        return await _answer(up_reader, writer, method, fault)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, fault: Fault | None) -> bool:
    head = await reader.readuntil(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 100"):
        head = await reader.readuntil(b"\r\n\r\n")
    bare = method == "HEAD" or head.split(b" ", 2)[1] in (b"204", b"304")
    if fault is None:
        writer.write(head)
        async for piece in _body(reader, head, bare):
            writer.write(piece)
            await writer.drain()
        return True
    body = b"".join([piece async for piece in _body(reader, head, bare)])
    if fault == "lost":
        return await _refuse(writer, "reset")
    half = body[: len(body) // 2]
    if fault == "short":
        writer.write(head.replace(b"Content-Length: %d\r\n" % len(body), b"Content-Length: %d\r\n" % len(half)) + half)
        await writer.drain()
        return True
    writer.write(head)
    if fault == "cut":
        writer.write(half)
        await writer.drain()
        return False
    for start in range(0, len(body), SLOW_BYTES):
        writer.write(body[start : start + SLOW_BYTES])
        await writer.drain()
        await asyncio.sleep(SLOW_SECONDS)
    return True


async def _refuse(writer: asyncio.StreamWriter, fault: Fault) -> bool:
    if fault == "silent":
        await asyncio.sleep(3600)
    told: socket.socket | None = writer.get_extra_info("socket")
    if told is not None:  # lingering for 0 seconds makes closing a reset
        told.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
    return False


async def _body(reader: asyncio.StreamReader, head: bytes, bare: bool = False) -> AsyncIterator[bytes]:
    """The bytes of a message's body as they come, chunk marks included. bare: it has none, whatever its head says."""
    if bare:
        return
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
    if b"chunked" in fields.get(b"transfer-encoding", b""):
        size = 1
        while size:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            yield line + await reader.readexactly(size + 2)
        return
    left = int(fields.get(b"content-length", b"0"))
    while left:
        piece = await reader.read(min(left, CHUNK_BYTES))
        if not piece:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(piece)
        yield piece


def _without_expect(head: bytes) -> bytes:
    return b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:"))


def _failure(status: str, bare: bool) -> bytes:
    code = {"500": "InternalError", "503": "SlowDown"}[status]
    body = b"" if bare else f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    return f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@contextmanager
def running(proxy: Proxy) -> Iterator[Proxy]:
    """The proxy, in a thread of this process."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="proxy", daemon=True)
    thread.start()
    listening = asyncio.run_coroutine_threadsafe(proxy.start(), loop).result()
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(listening.close)
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(proxy.stop(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)


def main() -> None:
    """Run until killed; one line of output, the port."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", type=int)
    parser.add_argument("--latency", type=float, default=0.02)
    given = parser.parse_args()

    async def serve() -> None:
        proxy = Proxy(given.server, given.latency)
        listening = await proxy.start()
        print(proxy.port, flush=True)
        await listening.serve_forever()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
