"""Servers on the loopback: ours in a thread, and one that misbehaves as a test says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import uvicorn

from pipelines.reward_app import Limits, create_app
from pipelines.rewards.base import Reward


@contextmanager
def served(reward: Reward, token: str | None = None, limits: Limits | None = None) -> Iterator[str]:
    """The URL of a reward that is served by uvicorn in a thread."""
    app = create_app(reward, token, limits or Limits())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@dataclass
class Misbehaving:
    """What the next requests get, and what was asked. `answers` are taken one by one; then every sample scores 0.5."""

    answers: list[Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    version: str = "1"
    url: str = ""

    @property
    def batches(self) -> list[int]:
        """Sizes of the batches that were asked for."""
        return [len(body["samples"]) for body in self.asked]


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    """A whole answer."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def status(code: int, detail: str = "no", **headers: str) -> Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]:
    """An error answer."""
    return lambda handler, _: send(handler, code, json.dumps({"detail": detail}).encode(), **headers)


def answer(body: bytes | str | Callable[[int], Any]) -> Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]:
    """A 200 with this body, or with the scores that a function makes of the number of samples."""

    def reply(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        if callable(body):
            told = {"reward": "flaky", "version": "1", "scores": body(len(asked["samples"]))}
            send(handler, 200, json.dumps(told).encode())
        else:
            send(handler, 200, body.encode() if isinstance(body, str) else body)

    return reply


@contextmanager
def misbehaving(port: int = 0) -> Iterator[Misbehaving]:
    """A server that does what its `answers` say."""
    state = Misbehaving()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.headers.append(dict(self.headers))
            told = json.dumps({"reward": "flaky", "version": state.version})
            (state.answers.pop(0) if state.answers else answer(told))(self, {})

        def do_POST(self) -> None:
            state.headers.append(dict(self.headers))
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append(asked)
            good = {"reward": "flaky", "version": state.version, "scores": [{"value": 0.5}] * len(asked["samples"])}
            (state.answers.pop(0) if state.answers else answer(json.dumps(good)))(self, asked)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
