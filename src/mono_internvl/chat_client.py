"""A model behind any OpenAI-compatible address: one question, one reply, whatever the server does.

Time-outs, hang-ups, errors of the server and replies that cannot be read are tried again, each time
after twice as long; a server that is asked too fast is given the time it asks for, by all threads.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from mono_internvl.errors import ConfigError, EndpointError

_MOST_REPLY_BYTES = 1 << 20
_MOST_PAUSES = 20  # of one question, that its server asks for
_LONGEST_PAUSE_S = 300.0
_REFUSES_ALL = {401, 403, 404, 405}
_TOO_MANY_REQUESTS = 429


@dataclass(frozen=True)
class Reply:
    """What a model said.

    Attributes:
        text: Of its first choice.
        is_cut: Whether it stopped at the longest answer that was allowed.
    """

    text: str
    is_cut: bool


@dataclass
class ChatClient:
    """An address and a model there; `ask` may be called by many threads.

    Attributes:
        url: Up to `/v1`.
        model: As the endpoint calls it.
        name_of_url: How messages call the address.
        key_variables: Environment variables of the key; the first that is set counts.
        wait_s: Before the second attempt; twice as long before each other.
        timeout_s: Of one attempt, the whole reply included.
        attempts: Of one question.
        requests_per_minute: By all threads together; None for no limit.
    """

    url: str
    model: str
    name_of_url: str = "url"
    key_variables: Sequence[str] = ("OPENAI_API_KEY",)
    wait_s: float = 1.0
    timeout_s: float = 120.0
    attempts: int = 5
    requests_per_minute: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _next: float = field(default=0.0, init=False, repr=False)
    _closed: threading.Event = field(default_factory=threading.Event, init=False, repr=False)

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise ConfigError(
                f"{self.name_of_url}={self.url!r}; expected http:// or https:// up to /v1"
            )

    def ask(self, content: str | Sequence[Mapping[str, Any]], max_tokens: int) -> Reply:
        """The likeliest reply to one message of a user's.

        Args:
            content: A text, or texts and images in the form of the API.
            max_tokens: Longest reply.

        Raises:
            EndpointError: There is none; its `scope` says for whom.
        """
        request = self._request(content, max_tokens)
        pauses = attempt = 0
        while True:
            self._wait_for_turn()
            try:
                return self._reply(request)
            except urllib.error.HTTPError as error:
                with error:
                    if error.code in _REFUSES_ALL:
                        raise EndpointError(f"{error}", scope="endpoint") from error
                    if error.code == _TOO_MANY_REQUESTS and pauses < _MOST_PAUSES:
                        pauses += 1
                        self._pause(_asked_pause(error.headers.get("Retry-After"), self.wait_s))
                        continue
                    if 400 <= error.code < 500 and error.code not in (408, _TOO_MANY_REQUESTS):
                        raise EndpointError(f"{error}", scope="request") from error
                problem: Exception = error
            except (OSError, HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                problem = error
            attempt += 1
            if attempt >= self.attempts:
                said = str(problem) or type(problem).__name__
                raise EndpointError(f"{attempt} attempts, last: {said}") from problem
            self._closed.wait(self.wait_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))

    def close(self) -> None:
        """Ask nothing any more: what waits for its turn gives up."""
        self._closed.set()

    def _request(
        self, content: str | Sequence[Mapping[str, Any]], max_tokens: int
    ) -> urllib.request.Request:
        key = next((os.environ[name] for name in self.key_variables if os.environ.get(name)), "")
        asked = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        address = self.url.rstrip("/") + "/chat/completions"
        return urllib.request.Request(address, json.dumps(asked).encode(), headers)

    def _reply(self, request: urllib.request.Request) -> Reply:
        until = time.monotonic() + self.timeout_s
        data = b""
        with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
            while chunk := response.read1(1 << 16):
                data += chunk
                if len(data) > _MOST_REPLY_BYTES:
                    raise ValueError(f"a reply of more than {_MOST_REPLY_BYTES:,} bytes")
                if time.monotonic() > until:  # a few bytes at a time never run into the other one
                    raise TimeoutError(f"no whole reply within {self.timeout_s:g} s")
        choice = json.loads(data)["choices"][0]
        text = choice["message"]["content"]
        if text is not None and not isinstance(text, str):
            raise ValueError(f"a reply of type {type(text).__name__}")
        return Reply(text or "", is_cut=choice.get("finish_reason") == "length")

    def _wait_for_turn(self) -> None:
        while not self._closed.is_set():
            with self._lock:
                left = self._next - time.monotonic()
                if left <= 0:
                    if self.requests_per_minute is not None:
                        self._next = time.monotonic() + 60 / self.requests_per_minute
                    return
            self._closed.wait(left)
        raise EndpointError("no longer asked")

    def _pause(self, seconds: float) -> None:
        """No thread asks anything for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _asked_pause(header: str | None, otherwise: float) -> float:
    """Seconds of a `Retry-After`, which is a number of them or a date."""
    if header is None:
        return otherwise
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return otherwise
    return min(max(0.0, seconds), _LONGEST_PAUSE_S) if seconds == seconds else otherwise
