"""Answers on disk: a JSON line for each, with its record, its score and how it was asked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mono_internvl.errors import SampleError
from mono_internvl.runs.json_lines import read_lines, to_line

_OURS = ("question", "prediction", "score", "blind", "protocol")
_DRAW = "draw"


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        record: The record that was asked.
        question: Its last question.
        text: What the model said, grounding tokens kept.
        score: In [0, 1]; None where answers are scored together, afterwards.
        is_blind: Whether the images were hidden.
        protocol: How it was asked, as `Protocol.to_dict` gives it; None in files older than that.
        draw: Where several answers were drawn, which of them; None where there is one.
    """

    record: Mapping[str, Any]
    question: str
    text: str
    score: float | None
    is_blind: bool
    protocol: Mapping[str, Any] | None = None
    draw: int | None = None

    @property
    def kind(self) -> str:
        """Of the record."""
        return str(self.record["kind"])

    def to_row(self) -> dict[str, Any]:
        """The record with what was said: one line of a file."""
        own = (self.question, self.text, self.score, self.is_blind, self.protocol)
        drawn = {} if self.draw is None else {_DRAW: self.draw}
        return {**self.record, **dict(zip(_OURS, own, strict=True)), **drawn}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Prediction:
        """What `to_row` gives, read again.

        Raises:
            ValueError: A field is missing or of another form.
        """
        text, score, is_blind = row.get("prediction"), row.get("score"), row.get("blind")
        protocol = row.get("protocol")
        if not isinstance(row.get("kind"), str) or not isinstance(text, str):
            raise ValueError("kind and prediction have to be texts")
        if isinstance(score, bool) or not isinstance(score, int | float | None):
            raise ValueError(f"score={score!r}; expected a number")
        if not math.isfinite(score or 0) or not isinstance(is_blind, bool):
            raise ValueError(f"score={score!r}, blind={is_blind!r}; expected a number and a truth")
        if not isinstance(protocol, dict | None):
            raise ValueError(f"protocol={protocol!r}; expected an object")
        is_drawn = bool(protocol and protocol.get("drawing"))
        draw = row.get(_DRAW) if is_drawn else None
        if draw is not None and (isinstance(draw, bool) or not isinstance(draw, int)):
            raise ValueError(f"draw={draw!r}; expected its number")
        ours = {*_OURS, _DRAW} if is_drawn else set(_OURS)
        record = {name: value for name, value in row.items() if name not in ours}
        return cls(record, str(row.get("question", "")), text, score, is_blind, protocol, draw)


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


def read_predictions(file: Path) -> list[Prediction]:
    """The answers in a file.

    Raises:
        SampleError: It cannot be read, or a line is no answer.
    """
    try:
        lines = read_lines(file)
    except (OSError, ValueError) as error:
        raise SampleError(f"{file}: not a readable predictions file ({error})") from error
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"{type(row).__name__}; expected an object")
            found.append(Prediction.from_row(row))
        except ValueError as error:
            raise SampleError(f"{file}:{number}: not a prediction ({error})") from error
    return found


def write_predictions(file: Path, predictions: Iterable[Prediction]) -> None:
    """One JSON line per answer; the file is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(to_line(p.to_row()) for p in predictions), encoding="utf-8")
    partial.replace(file)


def read_answers(run: Path, stage: str) -> list[Answer]:
    """Read the answers about images that a stage's model gave when it saw them.

    Args:
        run: the run folder.
        stage: name of the stage.

    Returns:
        The answers, without those to text-only or blind questions; empty if there is no file.

    Raises:
        SampleError: if a line is no answer.
    """
    path = run / "predictions" / f"{stage}.jsonl"
    answers = []
    for one in read_predictions(path) if path.is_file() else ():
        image = one.record.get("image")
        if isinstance(image, str) and not one.is_blind and one.score is not None:
            answers.append(_answer(one, image, one.score))
    return answers


def _answer(one: Prediction, image: str, score: float) -> Answer:
    return Answer(
        id=str(one.record.get("id", "")),
        kind=one.kind,
        image=image,
        question=one.question,
        truth=str(one.record.get("answer", "")),
        text=one.text,
        score=score,
    )
