"""An OpenAI-compatible server that misbehaves as it is told, image by image."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[[int], str]
"""From how often the same was asked already to what is done."""


class CaptionServer(ThreadingHTTPServer):
    """Answers by a table of behaviours; counts what it was asked.

    Attributes:
        behaviour: Of an image by the digest of its bytes, where it is not "caption".
        asked: Requests of each image.
        answered: Captions that were sent whole, of each image.
        most_at_once: Requests that were under way at the same time.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour: dict[str, Behaviour] = {}
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.messages: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self.delay_s = 0.0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up here; nothing is printed."""


class _Handler(BaseHTTPRequestHandler):
    server: CaptionServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        link = body["messages"][0]["content"][0]["image_url"]["url"]
        image = digest(base64.b64decode(link.partition(",")[2]))
        with server.lock:
            before = server.asked[image]
            server.asked[image] += 1
            server.messages.append(body)
            server.times.append(time.monotonic())
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            time.sleep(server.delay_s)
            self._act(server.behaviour.get(image, lambda count: "caption")(before), image)
        finally:
            with server.lock:
                server.at_once -= 1

    def _act(self, what: str, image: str) -> None:
        status, _, rest = what.partition(" ")
        if what == "slow":
            time.sleep(1.0)
            self._send(200, b"{}")
        elif what == "drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(40):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)
            self.wfile.write(reply("What comes long after the time is over."))
        elif what == "gone":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif what == "half":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"mess')
        elif what in ("not json", "other json", "list"):
            bodies = {"not json": b"<html>", "other json": b'{"choices": []}', "list": b"[1]"}
            self._send(200, bodies[what])
        elif what == "no text":
            self._send(200, reply(None))
        elif what.startswith("say "):
            self._send(200, reply(rest))
        elif what == "cut":
            self._send(200, reply("a street in the rain with", "length"))
        elif status.isdecimal():
            self._send(int(status), b"{}", {"Retry-After": rest} if rest else {})
        else:
            with self.server.lock:
                self.server.answered[image] += 1
            self._send(200, reply(f"A picture of the colours {image}."))

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def reply(text: str | None, finish: str = "stop") -> bytes:
    """The JSON of a completion."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"choices": [choice]}).encode()


def digest(data: bytes) -> str:
    """What an image is known by."""
    return hashlib.sha256(data).hexdigest()[:8]


@contextmanager
def running() -> Iterator[CaptionServer]:
    """A server at a free port."""
    server = CaptionServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
