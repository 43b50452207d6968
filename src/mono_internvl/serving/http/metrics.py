"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mono_internvl.generation.engine import Engine
from mono_internvl.generation.request import Result
from mono_internvl.serving.http.limits import Admission

_PREFIX = "mono_internvl_"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server, in a registry of their own.

    Args:
        engine: Whose rows and bytes are shown.
        admission: Whose requests are shown.
    """

    def __init__(self, engine: Engine, admission: Admission) -> None:
        self._registry = CollectorRegistry()
        self.responses = Counter(
            f"{_PREFIX}responses",
            "Responses by path and status; 499: the client had left.",
            ("path", "status"),
            registry=self._registry,
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = self._counter("cached_tokens", "Of these, not read again.")
        self.generated_tokens = self._counter("generated_tokens", "Tokens of answers.")
        self.seconds = self._histogram("answer_seconds", "From a request to the end of its answer.")
        self.first_token = self._histogram(
            "first_text_seconds", "From a request to the first text of a streamed answer."
        )
        for name, what, read in (
            ("answers_under_way", "Answers waiting or being generated.", lambda: admission.answers),
            ("answers_running", "Answers in the batch.", lambda: engine.num_running),
            (
                "answers_waiting",
                "Answers without room in the batch.",
                lambda: engine.num_waiting,
            ),
            ("request_bytes", "Held by requests under way.", lambda: admission.bytes),
            ("kv_bytes", "Keys and values of the batch.", lambda: engine.cache.num_bytes),
            ("prefix_bytes", "Kept beginnings of prompts.", lambda: engine.prefixes.num_bytes),
        ):
            Gauge(_PREFIX + name, what, registry=self._registry).set_function(read)

    def add(self, results: list[Result]) -> None:
        """Count the answers of a request."""
        for result in results:
            self.prompt_tokens.inc(result.num_prompt)
            self.cached_tokens.inc(result.num_cached)
            self.generated_tokens.inc(len(result.ids))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(_PREFIX + name, what, registry=self._registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(_PREFIX + name, what, buckets=_SECONDS, registry=self._registry)
