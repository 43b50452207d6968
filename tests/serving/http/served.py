"""A server to ask in tests: in a thread on a free port, or as a process of its own."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from mono_internvl.serving.http.limits import Limits
from mono_internvl.serving.http.run import make_server, make_service
from mono_internvl.serving.listening import bind
from mono_internvl.serving.session import ChatSession

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
NAME = "tiny"


class Address:
    """Where a server listens, and ways to ask it."""

    host, port = "127.0.0.1", 0

    @property
    def url(self) -> str:
        """As clients of the API want it."""
        return f"http://{self.host}:{self.port}/v1"

    def ask(
        self,
        value: Any,
        *,
        path: str = CHAT,
        method: str = "POST",
        headers: dict[str, str] = JSON,
        timeout: float = 60,
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers (lower case) and JSON or text of a response."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            body = value if isinstance(value, bytes) or value is None else json.dumps(value)
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            found = {name.lower(): text for name, text in response.getheaders()}
            data: Any = response.read().decode()
            if found.get("content-type") == "application/json":
                data = json.loads(data)
            return response.status, found, data
        finally:
            connection.close()

    def socket(self, data: bytes) -> socket.socket:
        """A connection on which some bytes were sent."""
        found = socket.create_connection((self.host, self.port), timeout=60)
        found.sendall(data)
        return found


class Served(Address):
    """A server in a thread, for as long as the `with` block lasts."""

    def __init__(
        self,
        session: ChatSession,
        *,
        name: str = NAME,
        api_key: str | None = None,
        **limits: int,
    ) -> None:
        self.service = make_service(
            session,
            name,
            limits=Limits(**limits),
            kv_bytes=2**26,
            prefix_bytes=2**24,
            api_key=api_key,
        )
        self.engine = self.service.thread.engine
        self.listener = bind(self.host, 0)
        self.port = self.listener.getsockname()[1]
        self._ready = threading.Event()
        self.server = make_server(self.service, self._ready.set)
        self._thread = threading.Thread(target=self.server.run, args=([self.listener],))

    def __enter__(self) -> Served:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.listener.close()

    def stop(self) -> None:
        """What SIGTERM does."""
        self.server.should_exit = True

    def wait_until_idle(self) -> None:
        """Wait until nothing is under way, which takes no longer than a step or two."""
        end = time.monotonic() + 10
        while self.service.admission.answers or self.engine.num_running:
            assert time.monotonic() < end, "an answer goes on that nobody waits for"
            time.sleep(0.01)


class Process(Address):
    """`mono-internvl serve` in a process of its own."""

    def __init__(self, model: str, *options: str) -> None:
        words = [sys.executable, "-m", "mono_internvl", "serve", "--model", model, "--port", "0"]
        self._process = subprocess.Popen(
            [*words, "--name", NAME, *options], stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if match := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line):
                self.port = int(match[1])
                break
        else:
            raise SystemExit(f"the server ended with {self._process.wait()}")
        threading.Thread(target=self._log, daemon=True).start()

    def _log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            print(line, end="", file=sys.stderr)

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def memory_mb(self, field: str = "VmRSS") -> float:
        """Its resident memory, now or (VmHWM) at most."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        match = re.search(rf"{field}:\s+(\d+) kB", status)
        assert match is not None
        return int(match[1]) / 1024

    def cpu_s(self) -> float:
        """CPU seconds that it has taken."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> int:
        """Tell it to stop, and wait; its exit code."""
        self._process.terminate()
        return self._process.wait(90)


def picture(seed: int = 0, side: int = 56) -> Image.Image:
    """A noisy picture."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def data_uri(image: Image.Image) -> str:
    """The picture as clients send it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def user(text: str, *urls: str) -> dict[str, Any]:
    """A message with images."""
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A request."""
    return {"model": NAME, "messages": list(messages), "max_tokens": 8, **fields}
