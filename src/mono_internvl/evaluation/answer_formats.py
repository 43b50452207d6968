"""Where in an answer its result stands, and how a question asks for that.

Source: `tools/reasoning_data_pipeline` of OpenGVLab/InternVL at 2410d1d (request and marker).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mono_internvl.errors import ConfigError
from mono_internvl.evaluation.benchmark import Benchmark
from mono_internvl.evaluation.metrics.metric import Metric
from mono_internvl.evaluation.protocol import Protocol
from mono_internvl.evaluation.questions import Question
from mono_internvl.processing.prompts import ImagePart, Turn

_MARKER = "final answer:"
_REQUEST = (
    "Your task is to answer the question below. Give step by step reasoning before you answer, and "
    'when you\'re ready to answer, please use the format "Final answer: .."\n\nQuestion:\n\n'
)


@dataclass(frozen=True)
class AnswerFormat:
    """A way to give an answer.

    Attributes:
        name: That it is asked for by.
        request: What is written before the question.
        marker: What the result stands behind, in lower case; empty where all of it is the result.
    """

    name: str
    request: str = ""
    marker: str = ""

    def extract(self, text: str) -> str | None:
        """The result in an answer; None where there is none to be found."""
        place = text.lower().rfind(self.marker) if self.marker else 0
        found = text[place + len(self.marker) :].strip() if place >= 0 else ""
        return found or None

    def of(self, benchmark: Benchmark) -> Benchmark:
        """The benchmark asked in this format, and scored by what `extract` finds."""
        if not self.marker:
            return benchmark
        return dataclasses.replace(
            benchmark,
            name=f"{benchmark.name}, {self.name}",
            metrics={name: self._on_result(one) for name, one in benchmark.metrics.items()},
            prompt=lambda question, protocol: self._asked(benchmark, question, protocol),
        )

    def _on_result(self, metric: Metric) -> Metric:
        def score(text: str, truth: Any) -> float:
            found = self.extract(text)
            return 0.0 if found is None else metric.score(found, truth)

        return dataclasses.replace(metric, score=score)

    def _asked(
        self, benchmark: Benchmark, question: Question, protocol: Protocol
    ) -> tuple[Turn, ...]:
        """The turns of a question, the request between its images and its text."""
        *before, last = benchmark.prompt(question, protocol)
        if not self.request:
            return (*before, last)
        parts = list(last.parts)
        first = next((n for n, part in enumerate(parts) if not isinstance(part, ImagePart)), None)
        text = "" if first is None else str(parts[first])
        line_break = "\n" if first else ""
        begun = f"{line_break}{self.request}{text.lstrip()}"
        place = len(parts) if first is None else first
        return (*before, Turn(last.role, (*parts[:place], begun, *parts[place + 1 :])))


FORMATS = {
    one.name: one
    for one in (
        AnswerFormat("whole"),
        AnswerFormat("marked", marker=_MARKER),
        AnswerFormat("final", request=_REQUEST, marker=_MARKER),
    )
}
"""By name: the whole answer; behind "Final answer:"; the same, and the question asks for it."""


def format_named(name: str) -> AnswerFormat:
    """A format by its name.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in FORMATS:
        raise ConfigError(f"format={name!r}; expected one of {', '.join(FORMATS)}")
    return FORMATS[name]
