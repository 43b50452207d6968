"""What a run leaves behind, as it is written and read: figures, costs, steps of training."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

from mono_internvl.errors import SampleError, TrainingStateError
from mono_internvl.runs.folder import write_whole
from mono_internvl.runs.json_lines import read_lines
from mono_internvl.runs.provenance import Origin

METRICS = "metrics.json"
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
    higher_is_better: bool = True

    def to_row(self) -> dict[str, Any]:
        """As it stands in files."""
        return {
            "name": self.name,
            "must": self.must,
            "aim": self.aim,
            "value": self.value,
            "met": self.is_met,
            "better": "higher" if self.higher_is_better else "lower",
        }

    @classmethod
    def from_row(cls, row: Mapping[str, object]) -> Target:
        """What `to_row` gives, read again."""
        return cls(
            name=_text(row.get("name")),
            must=_threshold(row.get("must")),
            aim=_threshold(row.get("aim")),
            value=_threshold(row.get("value")),
            is_met=row.get("met") is True,
            higher_is_better=row.get("better") != "lower",
        )

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
        value: mean score in [0, 1]; likewise `blind`, with the image hidden, `chance`, and
            `aligned`, on other items whose pictures are easier.
        items: number of held-out items behind `value`.
    """

    value: float | None
    blind: float | None = None
    chance: float | None = None
    items: int | None = None
    aligned: float | None = None

    def to_row(self) -> dict[str, Any]:
        """As it stands in files."""
        row = asdict(self)
        return {"score": row.pop("value"), **row}

    @classmethod
    def from_row(cls, row: Mapping[str, object]) -> Score:
        """What `to_row` gives, read again."""
        items = _number(row.get("items"))
        return cls(
            value=_number(row.get("score")),
            blind=_number(row.get("blind")),
            chance=_number(row.get("chance")),
            items=None if items is None else int(items),
            aligned=_number(row.get("aligned")),
        )


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
        """Name as the paper writes it."""
        return stage_label(self.name)

    def to_row(self) -> dict[str, Any]:
        """As it stands in files."""
        return {
            "name": self.name,
            "title": self.title,
            "steps": self.steps,
            "samples": self.samples,
            "cpu_minutes": self.cpu_minutes,
            "trains": self.trains,
            "scores": {kind: score.to_row() for kind, score in self.scores.items()},
            "text": dict(self.text),
            "text_logits_identical": self.is_text_identical,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, object]) -> StageResult:
        """What `to_row` gives, read again.

        Raises:
            TrainingStateError: A part has another form.
        """
        identical = row.get("text_logits_identical")
        return cls(
            name=_text(row.get("name")),
            title=_text(row.get("title")),
            trains=_text(row.get("trains")),
            steps=_number(row.get("steps")),
            samples=_number(row.get("samples")),
            cpu_minutes=_number(row.get("cpu_minutes")),
            scores={
                kind: Score.from_row(_mapping(score, f"scores.{kind}"))
                for kind, score in _mapping(row.get("scores"), "scores").items()
            },
            text=_numbers(row.get("text"), "text"),
            is_text_identical=identical if isinstance(identical, bool) else None,
        )


def stage_label(name: str) -> str:
    """Name of a stage as the paper writes it: `s11` is `S1.1`."""
    return "S" + ".".join(name[1:]) if re.fullmatch(r"s\d+", name) else name


@dataclass(frozen=True, kw_only=True)
class RunMetrics(Origin):
    """The contents of `metrics.json`; what made it is empty, or 0 processes, where it is unknown.

    Attributes:
        name: name of the run.
        is_quick: whether it is the small form for continuous integration.
        seed: of world, data order and first weights.
        cpu_minutes: cost, all processes together; None if unknown.
        minutes: the same by the clock.
        was_interrupted: whether a kill has lost some of its cost.
        targets: what had to be reached.
        stages: in order of training.
        language: measures of the language model before it saw images.
    """

    name: str
    is_quick: bool
    seed: int | None = None
    cpu_minutes: float | None
    minutes: float | None
    was_interrupted: bool = False
    targets: Sequence[Target]
    stages: Sequence[StageResult]
    language: Mapping[str, float] = field(default_factory=dict)

    @property
    def origin(self) -> dict[str, Any]:
        """What made it."""
        return {one.name: getattr(self, one.name) for one in fields(Origin)}

    def write(self, run: Path) -> None:
        """Write `metrics.json` into the folder of the run."""
        row = {
            "name": self.name,
            "quick": self.is_quick,
            "seed": self.seed,
            "cpu_minutes": self.cpu_minutes,
            "minutes": self.minutes,
            **self.origin,
            "was_interrupted": self.was_interrupted,
            "targets": [target.to_row() for target in self.targets],
            "stages": [stage.to_row() for stage in self.stages],
            "llm": self.language,
        }
        write_whole(run / METRICS, json.dumps(row, indent=2))


@dataclass(frozen=True)
class TextMeasures:
    """What became of a stage's language, in `text.json`.

    Attributes:
        perplexity: on held-out English.
        logits_identical: whether text-only logits equal the starting model's bit for bit.
    """

    perplexity: float
    logits_identical: bool

    def write(self, file: Path) -> None:
        """Write the file."""
        write_whole(file, json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path) -> TextMeasures:
        """What `write` wrote."""
        return cls(**_read_object(file))


def read_metrics(run: Path) -> RunMetrics:
    """Read `metrics.json` of a run.

    Args:
        run: the run folder.

    Returns:
        Its metrics; what a run may lack is None or empty.

    Raises:
        TrainingStateError: if the file is absent, is not JSON, or a part of it has another form.
    """
    path = run / METRICS
    if not path.is_file():
        raise TrainingStateError(
            f"metrics.json: not found in {run}; expected the folder of a finished run; "
            "name another folder or run the pipeline to its end first"
        )
    return read_metrics_file(path, run.name)


def read_metrics_file(path: Path, name: str = "") -> RunMetrics:
    """Read a file of the form of `metrics.json`, whatever it is called.

    Args:
        path: the file.
        name: of the run, if the file names none.

    Raises:
        TrainingStateError: as `read_metrics`.
    """
    row = _read_object(path)
    processes, seed = _number(row.get("processes")), _number(row.get("seed"))
    return RunMetrics(
        name=_text(row.get("name")) or name,
        is_quick=row.get("quick") is True,
        seed=None if seed is None else int(seed),
        cpu_minutes=_number(row.get("cpu_minutes")),
        minutes=_number(row.get("minutes")),
        command=_text(row.get("command")),
        device=_text(row.get("device")),
        processes=int(processes or 0),
        versions={
            name: _text(version)
            for name, version in _mapping(row.get("versions"), "versions").items()
        },
        date=_text(row.get("date")),
        plan=_mapping(row.get("plan"), "plan") or None,
        protocol=_mapping(row.get("protocol"), "protocol") or None,
        was_interrupted=row.get("was_interrupted") is True,
        targets=[Target.from_row(one) for one in _rows(row.get("targets"), "targets")],
        stages=[StageResult.from_row(one) for one in _rows(row.get("stages"), "stages")],
        language=_numbers(row.get("llm"), "llm"),
    )


def add_cost(file: Path, phase: str, seconds: float) -> None:
    """Add the CPU seconds of a phase of one process to the file of its costs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    costs = _numbers(_read_object(file), file.name) if file.exists() else {}
    write_whole(file, json.dumps({**costs, phase: costs.get(phase, 0.0) + seconds}))


def cpu_minutes(folder: Path, phase: str | None = None) -> float:
    """CPU minutes of all processes in the folder of a stage: of one phase, or of all."""
    seconds = 0.0
    for file in folder.glob("cost*.json"):
        costs = _numbers(_read_object(file), file.name)
        seconds += sum(costs.values()) if phase is None else costs.get(phase, 0.0)
    return seconds / 60


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


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingStateError(
            f"{path.name}: {path} is not JSON ({error}); expected an object; "
            "run the evaluation again"
        ) from error
    return _mapping(loaded, path.name)


def _mapping(value: object, field: str) -> Mapping[str, Any]:
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
    found = {name: _number(entry) for name, entry in _mapping(value, field).items()}
    return {name: entry for name, entry in found.items() if entry is not None}


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _threshold(value: object) -> Threshold:
    return value if isinstance(value, bool | str) else _number(value)


def _text(value: object) -> str:
    return "" if value is None else str(value)
