"""What a benchmark is: records, prompts, metrics, protocols, and what others have published."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mono_internvl.errors import ConfigError, SampleError
from mono_internvl.evaluation.metrics.metric import Metric
from mono_internvl.evaluation.protocol import Protocol
from mono_internvl.evaluation.questions import Question, read_records, with_suffix
from mono_internvl.processing.prompts import Turn
from mono_internvl.runs.benchmark_results import PublishedScore
from mono_internvl.runs.json_lines import to_line
from mono_internvl.runs.predictions import Prediction


@dataclass(frozen=True)
class Mean:
    """What a model reaches on the records of one kind.

    Attributes:
        score: in [0, 1].
        items: number of records.
    """

    score: float
    items: int


def kind_of(record: Mapping[str, Any]) -> str:
    """The record's kind."""
    return str(record["kind"])


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A set of questions with the way to ask and to score them.

    Attributes:
        name: That it is asked for by.
        metrics: By the name in a record's `metric`, or in its `kind` where it has none.
        protocols: By name; the first is taken unless another is asked for.
        load: The questions in a file or folder of its data.
        prompt: The turns that ask a question under a protocol.
        group: Of a record, the mean that it counts in.
        published: Scores of others.
    """

    name: str
    metrics: Mapping[str, Metric]
    protocols: Mapping[str, Protocol]
    load: Callable[[Path], Iterable[Question]] = read_records
    prompt: Callable[[Question, Protocol], tuple[Turn, ...]] = with_suffix
    group: Callable[[Mapping[str, Any]], str] = kind_of
    published: tuple[PublishedScore, ...] = ()

    @property
    def protocol(self) -> Protocol:
        """The protocol that is taken unless another is asked for."""
        return next(iter(self.protocols.values()))

    def questions(self, data: Path) -> list[Question]:
        """The questions of its data, every one of which can be scored and written down.

        Raises:
            SampleError: A record is malformed, of an unknown kind or metric, has not what that
                needs to be scored, or cannot be written down with its answer.
        """
        questions = []
        for question in self.load(data):
            try:
                to_line(self.predict(question, "", self.protocol).to_row())
            except SampleError as error:
                raise SampleError(f"{question.sample.where}: {error}") from error
            except ValueError as error:
                where = question.sample.where
                raise SampleError(f"{where}: {error}; correct the record") from error
            questions.append(question)
        return questions

    def metric_of(self, record: Mapping[str, Any]) -> Metric:
        """How a record is scored.

        Raises:
            SampleError: It names no metric that this benchmark has.
        """
        field = "metric" if "metric" in record else "kind"
        name = record.get(field)
        if not isinstance(name, str) or name not in self.metrics:
            raise SampleError(
                f"{record.get('id', 'record')}: {field}={name!r:.80} is no metric of benchmark "
                f"{self.name!r}; expected one of {', '.join(self.metrics)}"
                + ("" if field == "metric" else ", or a `metric` of these beside the kind")
            )
        return self.metrics[name]

    def score(self, record: Mapping[str, Any], prediction: str) -> float:
        """Score an answer in [0, 1].

        Raises:
            SampleError: The record's metric is unknown, or its truth is missing or malformed.
        """
        metric = self.metric_of(record)
        truth = record.get(metric.field)
        name = record.get("id", "record")
        if truth is None:
            raise SampleError(
                f"{name}: no `{metric.field}` for metric {metric.name!r}; add it to the record"
            )
        if not metric.is_sound(truth):
            raise SampleError(
                f"{name}: `{metric.field}` is {truth!r:.80}; expected {metric.expected}, "
                "correct the record"
            )
        return metric.score(prediction, truth)

    def predict(self, question: Question, text: str, protocol: Protocol) -> Prediction:
        """The scored answer to a question."""
        score = self.score(question.record, text)
        return Prediction(
            question.record,
            question.text,
            text,
            score,
            question.is_blind,
            protocol.to_dict(),
            question.draw,
        )

    def mean_scores(self, predictions: Iterable[Prediction]) -> dict[str, Mean]:
        """What was reached in every group of records."""
        groups: dict[str, list[Prediction]] = defaultdict(list)
        for one in predictions:
            groups[self.group(one.record)].append(one)
        return {
            name: Mean(self.metric_of(found[0].record).mean(found), len(found))
            for name, found in groups.items()
        }


def named(benchmarks: Mapping[str, Benchmark], name: str) -> Benchmark:
    """A benchmark by its name.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in benchmarks:
        raise ConfigError(f"benchmark={name!r}; expected one of {', '.join(benchmarks)}")
    return benchmarks[name]
