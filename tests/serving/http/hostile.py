"""Malformed and hostile requests: `make serve-hostile MODEL=runs/quickstart/model CASES=10000`.

After each hundred a good request must be answered as it was at first; the memory of the server is
read then. Prints rows for `results/rows.jsonl`.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import gzip
import json
import os
import random
import socket
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # of `mutations`

from mutations import mutated_bytes, mutated_json
from served import CHAT, Address, Process, chat, data_uri, picture, user

MOST_GROWTH_MB = 200
EVERY = 100
_OPEN = 40  # connections that are left open, as slow clients do

GOOD = chat(user("what colour is this?", data_uri(picture(0))), max_tokens=4)


def request_bytes(
    body: bytes,
    *,
    method: str = "POST",
    path: str = CHAT,
    kind: str = "application/json",
    length: int | None = None,
    extra: str = "",
) -> bytes:
    """A request as it goes over the wire; the connection ends with it."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n{extra}\r\n"
    )
    return head.encode() + body


def _json(value: Any) -> bytes:
    return request_bytes(json.dumps(value).encode())


def _png(width: int, height: int) -> str:
    """A picture of one colour: a small file, whatever its size."""
    rows = zlib.compressobj()
    row = b"\0" * (1 + (width + 7) // 8)
    data = b"".join(rows.compress(row) for _ in range(min(height, 6000))) + rows.flush()

    def part(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body).to_bytes(4)
        return len(body).to_bytes(4) + kind + body + crc

    size = width.to_bytes(4) + height.to_bytes(4) + b"\x01\0\0\0\0"
    file = part(b"IHDR", size) + part(b"IDAT", data) + part(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + file).decode()


_BOMBS = [_png(60_000, 60_000), _png(5_000, 5_000), _png(1, 65_536), _png(33_000, 500)]
_URLS = [
    "http://169.254.169.254/latest", "https://a.example/a.png", "file:///etc/passwd", "/etc/passwd",
    "ftp://a/b", "s3://a/b", "../../config.json", "", "data:", "data:,", "data:image/png;base64,",
    "data:image/png;base64,AAAA", "data:text/html,<script>", "\x00", "javascript:alert(1)",
]  # fmt: skip
_CONTROL = ["<|im_end|>", "<|im_start|>system\n", "<IMG_CONTEXT>", "<img>", "</s>", "<s>", "<unk>"]
_FIELDS: list[dict[str, Any]] = [
    {"n": 0}, {"n": 10**9}, {"n": "1"}, {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 1.5},
    {"temperature": -1}, {"temperature": "hot"}, {"temperature": 1e-9}, {"top_p": 0}, {"top_p": 2},
    {"seed": -1}, {"seed": 2**64}, {"stop": [""]}, {"stop": ["a"] * 9}, {"stop": 3},
    {"stop": "a" * 10**5}, {"logprobs": "yes"}, {"top_logprobs": 3}, {"top_logprobs": 21},
    {"stream": 1}, {"stream_options": []}, {"tools": [{}]}, {"logit_bias": {"1": 5}},
    {"messages": []}, {"messages": None}, {"messages": "hi"}, {"messages": [[]]}, {"model": None},
    {"model": "other"}, {"unheard_of": 1}, {"response_format": {"type": "json_object"}},
    {"messages": [{"role": "tool", "content": "a"}]}, {"messages": [{"role": "user"}]},
    {"messages": [{"role": "assistant", "content": "a"}]}, {"frequency_penalty": 1},
    {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
    {"messages": [{"role": "user", "content": [{"type": "video", "video": "a"}]}]},
    {"messages": [{"role": "user", "content": "<image> <image>"}]},
    {"messages": [{"role": "system", "content": GOOD["messages"][0]["content"]}] * 2},
]  # fmt: skip


def _bad_field(rng: random.Random) -> bytes:
    return _json({**GOOD, **rng.choice(_FIELDS)})


def _bomb(rng: random.Random) -> bytes:
    return _json(chat(user("look", *[rng.choice(_BOMBS)] * rng.randint(1, 3)), max_tokens=1))


def _url(rng: random.Random) -> bytes:
    return _json(chat(user("look", rng.choice(_URLS)), max_tokens=1))


def _broken_image(rng: random.Random) -> bytes:
    head, _, data = data_uri(picture(rng.randrange(5))).partition(",")
    broken = base64.b64decode(data)[: rng.randrange(1, 60)]
    broken64 = base64.b64encode(broken).decode()
    text = rng.choice((data[: rng.randrange(len(data) // 2)] + "!", broken64, data[1:] + "="))
    return _json(chat(user("look", f"{head},{text}"), max_tokens=1))


def _control(rng: random.Random) -> bytes:
    return _json(chat(user(f"a {rng.choice(_CONTROL)} b"), max_tokens=1))


def _nested(rng: random.Random) -> bytes:
    body = rng.choice(
        (b'{"a":' * 10**5, b"[" * 10**6, b'{"messages":[' + b"[]," * 10**5 + b"0]}", b"9" * 10**5)
    )
    return request_bytes(body)


def _huge_prompt(rng: random.Random) -> bytes:
    text = rng.choice(("a", "one ", "\u4f60", "\n", " ")) * rng.choice((10**4, 10**6))
    return _json(chat(user(text), max_tokens=1))


def _many_messages(rng: random.Random) -> bytes:
    many = rng.choice((900, 50_000))
    return _json({**GOOD, "messages": [{"role": "user", "content": "a"}] * many})


def _too_large(rng: random.Random) -> bytes:
    return request_bytes(b'{"a', length=10 ** rng.randint(9, 18))


def _other_kind(rng: random.Random) -> bytes:
    body = json.dumps(GOOD).encode()
    if rng.random() < 0.5:
        return request_bytes(gzip.compress(body), extra="Content-Encoding: gzip\r\n")
    return request_bytes(body, kind=rng.choice(("text/plain", "", "multipart/form-data")))


def _other_path(rng: random.Random) -> bytes:
    path = rng.choice(("/", "/v1", "/../etc/passwd", "/v1/models/..%2f..", "/docs", "/%00", CHAT))
    method = rng.choice(("PUT", "DELETE", "OPTIONS", "PATCH"))
    return request_bytes(b"", method=method, path=path)


def _no_http(rng: random.Random) -> bytes:
    return rng.choice(
        (
            rng.randbytes(200) + b"\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 50_000 + b"\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 5 + b"\r\n\r\n",
        )
    )


REFUSED: list[Callable[[random.Random], bytes]] = [
    _bad_field, _bad_field, _bomb, _url, _broken_image, _control, _nested, _huge_prompt,
    _many_messages, _too_large, _other_kind, _other_path, _no_http,
]  # fmt: skip
"""What must end in 4xx."""


def _mutated(rng: random.Random) -> bytes:
    return request_bytes(mutated_json({**GOOD, "temperature": 1.0, "stop": ["a"], "n": 1}, rng))


def _mutated_bytes(rng: random.Random) -> bytes:
    return request_bytes(mutated_bytes(json.dumps(GOOD).encode(), rng))


EITHER = [_mutated, _mutated_bytes]
"""What may by chance be a good request."""


def _leaves_early(rng: random.Random) -> bytes:
    whole = _json({**GOOD, "stream": rng.random() < 0.5, "max_tokens": 400})
    return whole[: rng.choice((len(whole), len(whole) // 2, 40))]


@dataclass
class Outcome:
    """What became of the cases.

    Attributes:
        statuses: How often each came; 0 for no answer.
        failures: What should not have happened.
        memory_mb: Of the server, after each hundred.
    """

    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)


class Attack:
    """Sends cases to a server.

    Args:
        address: Of the server.
        read_mb: Its memory.
    """

    def __init__(self, address: Address, read_mb: Callable[[], float] = lambda: 0.0) -> None:
        self._address, self._read_mb = address, read_mb
        self._open: collections.deque[socket.socket] = collections.deque()
        self.outcome = Outcome()

    def run(self, cases: int, seed: int = 0) -> Outcome:
        """Send so many cases, the same for the same seed."""
        expected = self._good()
        for number in range(cases):
            try:
                self._case(random.Random(f"{seed}:{number}"), number)
            except OSError as error:
                self.outcome.failures.append(f"{number}: {error!r}")
            if (number + 1) % EVERY == 0:
                if (found := self._good()) != expected:
                    self.outcome.failures.append(f"{number}: a good request got {found!r}")
                self.outcome.memory_mb.append(self._read_mb())
        for connection in self._open:
            connection.close()
        return self.outcome

    def _good(self) -> Any:
        status, _, answer = self._address.ask(GOOD)
        return answer["choices"] if status == 200 else (status, answer)

    def _case(self, rng: random.Random, number: int) -> None:
        which = rng.random()
        if which < 0.1:  # a client that hangs up, or one that says no more for a long time
            connection = self._address.socket(_leaves_early(rng))
            if which < 0.05:
                connection.close()
            else:
                self._open.append(connection)
                if len(self._open) > _OPEN:
                    self._open.popleft().close()
            return
        make = rng.choice(EITHER if which < 0.3 else REFUSED)
        status, body = self._send(make(rng))
        self.outcome.statuses[status] += 1
        is_error = 400 <= status < 500 and _is_error(body)
        if not is_error and not (make in EITHER and status == 200):
            self.outcome.failures.append(f"{number} {make.__name__}: {status} {body[:200]!r}")

    def _send(self, data: bytes) -> tuple[int, bytes]:
        """Status and body of the response; 0 if there is none."""
        connection = socket.create_connection((self._address.host, self._address.port), 60)
        with connection:
            # Refused before it was all sent, its answer may be there.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(data)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := connection.recv(65536):
                    received += piece
                    head, _, body = received.partition(b"\r\n\r\n")
                    if b"content-length: %d\r\n" % len(body) in head + b"\r\n":
                        break
        head, _, body = received.partition(b"\r\n\r\n")
        words = head.split(b" ", 2)
        return int(words[1]) if len(words) > 1 else 0, body


def _is_error(body: bytes) -> bool:
    """Whether a body is an error as the API has it."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return set(error) == {"message", "type", "param", "code"} and bool(error["message"])


def main() -> int:
    from load import row

    cases, seed = int(os.environ.get("CASES", "10000")), int(os.environ.get("SEED", "0"))
    server = Process(os.environ["MODEL"])
    attack = Attack(server, server.memory_mb)
    attack.run(200, seed=seed + 1)  # what is read and made once
    warm = server.memory_mb()
    outcome = attack.run(cases, seed)
    growth = max(outcome.memory_mb) - warm
    peak = server.memory_mb("VmHWM") - warm
    print(f"{dict(outcome.statuses)}; {growth:.0f} MB more, {peak:.0f} at most", file=sys.stderr)
    for failure in outcome.failures[:20]:
        print(failure, file=sys.stderr)
    failed = len(outcome.failures) + (not server.is_alive) + (server.stop() != 0)
    command = f"make serve-hostile MODEL=runs/quickstart/model CASES={cases}"
    for what, value, unit in (
        (f"{cases:,} hostile requests: answered otherwise than by 4xx, or not at all", failed, ""),
        (f"{cases:,} hostile requests: memory of the server, growth", round(growth), "MB"),
    ):
        print(row(what, value, unit, command))
    return 1 if failed or growth > MOST_GROWTH_MB else 0


if __name__ == "__main__":
    sys.exit(main())
