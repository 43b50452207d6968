"""Reads what a run left behind: `metrics.json`, the steps of its stages, its predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from mono_internvl.errors import SampleError, TrainingStateError
from mono_internvl.runs.json_lines import read_lines

START = "start"
"""Name of the stage before all training: the language model with fresh visual parts."""

Threshold: TypeAlias = float | bool | str | None


@dataclass(frozen=True)
class Target:
    """One thing the run had to reach.

    Attributes:
        name: what is measured.
        must: the least that is accepted.
        aim: what was hoped for.
        value: what came out; None if it was not measured.
        is_met: whether the must is met, as the run decided it.
        higher_is_better: the direction.
    """

    name: str
    must: Threshold
    aim: Threshold
    value: Threshold
    is_met: bool
    higher_is_better: bool

    @property
    def reaches_aim(self) -> bool:
        """Whether the value reaches the aim as well; False where the two cannot be compared."""
        if isinstance(self.aim, bool) or isinstance(self.value, bool):
            return self.aim is self.value
        if not isinstance(self.aim, float) or not isinstance(self.value, float):
            return False
        return self.value >= self.aim if self.higher_is_better else self.value <= self.aim


@dataclass(frozen=True)
class Score:
    """How well one kind of task is done.

    Attributes:
        value: mean score in [0, 1]; likewise `blind`, with the image hidden, and `chance`.
        items: number of held-out items.
    """

    value: float | None
    blind: float | None
    chance: float | None
    items: int | None


@dataclass(frozen=True)
class StageResult:
    """A stage and the model at its end.

    Attributes:
        name: folder name, such as `s11`.
        title: what the stage is for.
        trains: which parameters learn, in words.
        steps: optimizer steps; None if it does not train. Likewise `samples` and `cpu_minutes`.
        scores: score of each kind of task.
        text: what the language is like, by measure.
        is_text_identical: whether the text-only logits equal the starting language model's bit for
            bit; None if that was not checked.
    """

    name: str
    title: str
    trains: str
    steps: float | None
    samples: float | None
    cpu_minutes: float | None
    scores: Mapping[str, Score]
    text: Mapping[str, float]
    is_text_identical: bool | None

    @property
    def label(self) -> str:
        """Name as the paper writes it: `s11` is `S1.1`."""
        digits = self.name[1:]
        if self.name[:1] == "s" and digits.isdigit():
            return "S" + ".".join(digits)
        return self.name


@dataclass(frozen=True)
class RunMetrics:
    """The contents of `metrics.json`.

    Attributes:
        name: name of the run.
        is_quick: whether it is the small form for continuous integration.
        cpu_minutes: cost, all processes together; None if unknown.
        minutes: the same by the clock.
        command: the command line.
        device: what it ran on.
        processes: number of processes; None if unknown.
        versions: version by name, the commit among them.
        targets: what had to be reached.
        stages: in order of training.
        language: measures of the language model before it saw images.
    """

    name: str
    is_quick: bool
    cpu_minutes: float | None
    minutes: float | None
    command: str
    device: str
    processes: float | None
    versions: Mapping[str, str]
    targets: Sequence[Target]
    stages: Sequence[StageResult]
    language: Mapping[str, float]


@dataclass(frozen=True)
class Answer:
    """One answer to a held-out question about an image.

    Attributes:
        id: id of the record.
        kind: kind of task.
        image: path of the image relative to the data root.
        question: what was asked.
        truth: the true answer.
        text: what the model said.
        score: in [0, 1].
    """

    id: str
    kind: str
    image: str
    question: str
    truth: str
    text: str
    score: float


def read_metrics(run: Path) -> RunMetrics:
    """Read `metrics.json` of a run.

    Args:
        run: the run folder.

    Returns:
        Its metrics; what a run may lack is None or empty.

    Raises:
        TrainingStateError: if the file is absent, is not JSON, or a part of it has another form.
    """
    path = run / "metrics.json"
    if not path.is_file():
        raise TrainingStateError(
            f"metrics.json: not found in {run}; expected the folder of a finished run; "
            "name another folder or run the pipeline to its end first"
        )
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrainingStateError(
            f"metrics.json: {path} is not JSON ({error}); expected an object; "
            "run the evaluation again"
        ) from error
    fields = _mapping(loaded, "metrics.json")
    return RunMetrics(
        name=_text(fields.get("name")) or run.name,
        is_quick=fields.get("quick") is True,
        cpu_minutes=_number(fields.get("cpu_minutes")),
        minutes=_number(fields.get("minutes")),
        command=_text(fields.get("command")),
        device=_text(fields.get("device")),
        processes=_number(fields.get("processes")),
        versions={
            name: _text(version)
            for name, version in _mapping(fields.get("versions"), "versions").items()
        },
        targets=[_target(row) for row in _rows(fields.get("targets"), "targets")],
        stages=[_stage(row) for row in _rows(fields.get("stages"), "stages")],
        language=_numbers(fields.get("llm"), "llm"),
    )


def read_losses(run: Path, stage: str) -> list[float]:
    """Read the losses of a stage, one for each step, in order.

    A step that was made again after a kill counts once, with its last loss; steps whose loss is not
    finite are left out, as is a last line that was cut off while it was written.

    Args:
        run: the run folder.
        stage: name of the stage.

    Returns:
        The losses; empty if the stage left none.

    Raises:
        SampleError: if a line in the middle is not a JSON object.
    """
    by_step = {}
    for row in _json_lines(run / stage / "metrics.jsonl"):
        step, loss = _number(row.get("step")), _number(row.get("loss"))
        if step is not None and loss is not None:
            by_step[step] = loss
    return [loss for _, loss in sorted(by_step.items())]


def read_answers(run: Path, stage: str) -> list[Answer]:
    """Read the answers about images that a stage's model gave when it saw them.

    Args:
        run: the run folder.
        stage: name of the stage.

    Returns:
        The answers, without those to text-only or blind questions and those without a score; empty
        if there is no file.

    Raises:
        SampleError: if a line in the middle is not a JSON object.
    """
    answers = []
    for row in _json_lines(run / "predictions" / f"{stage}.jsonl"):
        image, score = row.get("image"), _number(row.get("score"))
        if row.get("blind") is True or not isinstance(image, str) or score is None:
            continue
        names = ("id", "kind", "question", "answer", "prediction")
        identity, kind, question, truth, text = (_text(row.get(name)) for name in names)
        answers.append(Answer(identity, kind, image, question, truth, text, score))
    return answers


def _json_lines(path: Path) -> list[Mapping[str, object]]:
    if not path.is_file():
        return []
    lines = read_lines(path)
    rows: list[Mapping[str, object]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise SampleError(
                f"{path}:{number}: not JSON ({error}); expected an object; remove the line"
            ) from error
        if not isinstance(row, dict):
            raise SampleError(
                f"{path}:{number}: {type(row).__name__}; expected an object; remove the line"
            )
        rows.append(row)
    return rows


def _target(row: Mapping[str, object]) -> Target:
    return Target(
        name=_text(row.get("name")),
        must=_threshold(row.get("must")),
        aim=_threshold(row.get("aim")),
        value=_threshold(row.get("value")),
        is_met=row.get("met") is True,
        higher_is_better=row.get("better") != "lower",
    )


def _stage(row: Mapping[str, object]) -> StageResult:
    identical = row.get("text_logits_identical")
    return StageResult(
        name=_text(row.get("name")),
        title=_text(row.get("title")),
        trains=_text(row.get("trains")),
        steps=_number(row.get("steps")),
        samples=_number(row.get("samples")),
        cpu_minutes=_number(row.get("cpu_minutes")),
        scores={
            kind: _score(_mapping(score, f"scores.{kind}"))
            for kind, score in _mapping(row.get("scores"), "scores").items()
        },
        text=_numbers(row.get("text"), "text"),
        is_text_identical=identical if isinstance(identical, bool) else None,
    )


def _score(fields: Mapping[str, object]) -> Score:
    items = _number(fields.get("items"))
    return Score(
        value=_number(fields.get("score")),
        blind=_number(fields.get("blind")),
        chance=_number(fields.get("chance")),
        items=None if items is None else int(items),
    )


def _mapping(value: object, field: str) -> Mapping[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong_form(field, value, "an object")
    return value


def _rows(value: object, field: str) -> list[Mapping[str, object]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _wrong_form(field, value, "a list of objects")
    return [_mapping(row, f"{field}[{index}]") for index, row in enumerate(value)]


def _wrong_form(field: str, value: object, expected: str) -> TrainingStateError:
    return TrainingStateError(
        f"metrics.json: {field} is of type {type(value).__name__}; expected {expected}; "
        "run the evaluation again"
    )


def _numbers(value: object, field: str) -> dict[str, float]:
    fields = {name: _number(entry) for name, entry in _mapping(value, field).items()}
    return {name: entry for name, entry in fields.items() if entry is not None}


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _threshold(value: object) -> Threshold:
    return value if isinstance(value, bool | str) else _number(value)


def _text(value: object) -> str:
    return "" if value is None else str(value)
