"""Real servers for the judge's tests: HTTP on this machine, with the behaviour that a test gives."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, object, dict[str, str]]


class JudgeServer(ThreadingHTTPServer):
    """Speaks /v1/chat/completions; keeps what it was asked, and counts how many requests it had at one time."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, behaviour: Callable[[dict, int], Any], port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.behaviour = behaviour
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.lock, self.now, self.peak = threading.Lock(), 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def cases(self) -> list[dict]:
        return [case_of(body) for body in self.bodies]

    def handle_error(self, request: object, client_address: object) -> None:
        """A judge that gave up waiting has closed its end: no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: JudgeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers["Authorization"])
            number = len(server.bodies)
            server.now += 1
            server.peak = max(server.peak, server.now)
        try:
            if self.path != "/v1/chat/completions":
                status, content, headers = 404, {"error": {"message": "no such path"}}, {}
            else:
                status, content, headers = as_reply(server.behaviour(body, number))
        finally:
            with server.lock:
                server.now -= 1
        if status == 0:  # the connection ends without a word
            self.close_connection = True
            return
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        kind = "text/html" if isinstance(content, str) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def as_reply(said: Any) -> Reply:
    """A text is a judge's reply; a number a status, after which another try is due at once."""
    if isinstance(said, str) or said is None:
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        return 200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}, {}
    if isinstance(said, int):
        return said, {"error": {"message": f"status {said}", "type": "x"}}, {"retry-after-ms": "1"}
    return said


def case_of(body: dict) -> dict:
    """The case that stands in a request."""
    text = body["messages"][0]["content"]
    start = text.index("\n{\n")
    return json.JSONDecoder().raw_decode(text[start + 1 :])[0]


@contextmanager
def serving(behaviour: Callable[[dict, int], Any], port: int = 0) -> Iterator[JudgeServer]:
    """A server until the end of the block. `behaviour` gets a request's body and its number, from 1."""
    server = JudgeServer(behaviour, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
