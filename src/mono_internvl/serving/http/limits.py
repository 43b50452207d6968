"""How much a server takes on: of each request, and of all that are under way.

Everything here runs on the event loop, so that nothing needs a lock.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from types import TracebackType

from mono_internvl.errors import ConfigError
from mono_internvl.generation.engine import MAX_ROWS
from mono_internvl.serving.http.errors import ApiError

MIB = 2**20
_LONGEST_WAIT_S = 60


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a server; every one is at least 1.

    Attributes:
        rows: Answers that are generated at once.
        queue: Answers that may wait beside them; what comes on top is told to come again.
        body_bytes: Of a request.
        images: Of a request.
        image_pixels: Of all images of a request together.
        answers: Of a request (`n`).
        answer_tokens: Longest answer; a request that asks for more gets so many.
        memory_bytes: That all requests under way may hold, keys and values not counted.
        connections: Open at a time.
        upload_s: For a request to arrive whole, headers and body each.
        send_s: For a client to take what it is sent.
        answer_s: From the moment a request was read to the end of its answers.
        drain_s: For answers under way when the server is told to stop.
    """

    rows: int = MAX_ROWS
    queue: int = 64
    body_bytes: int = 16 * MIB
    images: int = 16
    image_pixels: int = 16_000_000
    answers: int = 8
    answer_tokens: int = 1024
    memory_bytes: int = 1024 * MIB
    connections: int = 256
    upload_s: int = 30
    send_s: int = 30
    answer_s: int = 300
    drain_s: int = 60

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ConfigError(f"{name}={value}; expected at least 1")


class Admission:
    """Counts what is under way, and turns away what is too much.

    Args:
        limits: Of the server.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.answers = 0
        self.bytes = 0
        self._seconds = 1.0  # an answer took lately

    def enter(self) -> Held:
        """Take on a request of one answer.

        Raises:
            ApiError: 429, there are too many.
        """
        held = Held(self)
        held.add_answers(1)
        return held

    def finished(self, seconds: float) -> None:
        """Note how long an answer took."""
        self._seconds += 0.1 * (seconds - self._seconds)

    def busy(self, why: str) -> ApiError:
        """The error of a request that is turned away, with the time when to come again."""
        wait = math.ceil(self._seconds * max(1, self.answers / self.limits.rows))
        headers = {"Retry-After": str(min(wait, _LONGEST_WAIT_S))}
        return ApiError(429, f"{why}; come again later", code="server_busy", headers=headers)


class Held:
    """What one request holds until it is left.

    Args:
        admission: Of the server.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._answers = self._bytes = 0

    def add_answers(self, count: int) -> None:
        """Hold places for more answers.

        Raises:
            ApiError: 429, there are too many.
        """
        limits = self._admission.limits
        if self._admission.answers + count > limits.rows + limits.queue:
            raise self._admission.busy(
                f"{self._admission.answers} answers are under way, of at most "
                f"{limits.rows + limits.queue}"
            )
        self._admission.answers += count
        self._answers += count

    def set_bytes(self, count: int) -> None:
        """Hold so many bytes instead of those held before.

        Raises:
            ApiError: 429, all requests together hold too many.
        """
        more = count - self._bytes
        if more > 0 and self._admission.bytes + more > self._admission.limits.memory_bytes:
            raise self._admission.busy(
                f"requests under way hold {self._admission.bytes:,} bytes, of at most "
                f"{self._admission.limits.memory_bytes:,}"
            )
        self._admission.bytes += more
        self._bytes = count

    def __enter__(self) -> Held:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._admission.bytes -= self._bytes
        self._admission.answers -= self._answers
        self._bytes = self._answers = 0
