"""How an answer is scored: pure functions of strings and numbers, no model and no files.

Every score is between 0 and 1 and every item counts, an unreadable answer as 0. A `Metric` says
which field of a record holds its truth; `METRICS` names those that any record may ask for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rapidfuzz.distance import Levenshtein

from mono_internvl.processing.prompts import parse_boxes
from mono_internvl.runs.predictions import Prediction


def mean_of_scores(predictions: Sequence[Prediction]) -> float:
    """Return the mean over all answers."""
    return sum(one.score or 0.0 for one in predictions) / len(predictions)


@dataclass(frozen=True)
class Metric:
    """A way to score answers.

    Attributes:
        name: of the metric.
        field: of a record, which holds the truth.
        expected: what that has to be, in words.
        is_sound: whether a truth is that.
        score: an answer and its truth to [0, 1].
        mean: the answers of one kind to what a model reaches on all of them.
    """

    name: str
    field: str
    expected: str
    is_sound: Callable[[object], bool]
    score: Callable[[str, Any], float]
    mean: Callable[[Sequence[Prediction]], float] = mean_of_scores


def normalise(text: str) -> str:
    """Return a text in lower case, without white space or a full stop at its ends."""
    return text.strip().removesuffix(".").strip().lower()


def exact_match(prediction: str, answer: str) -> float:
    """Return 1 if both texts are the same after `normalise`, else 0."""
    return float(normalise(prediction) == normalise(answer))


def reading_score(prediction: str, answer: str) -> float:
    """Return 1 - character error rate, not below 0.

    Args:
        prediction: the text that was read; case and outer white space do not count.
        answer: the text in the picture.

    Returns:
        1 for a perfect reading, 0 where as many edits are needed as the answer has characters.
    """
    truth = answer.strip().lower()
    if not truth:
        return float(not prediction.strip())
    edits = Levenshtein.distance(prediction.strip().lower(), truth)
    return max(0.0, 1 - edits / len(truth))


def intersection_over_union(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the overlap of two boxes over their union.

    Args:
        first: left, top, right, bottom, in any unit.
        second: the same, in the same unit.

    Returns:
        0 (apart, or without area) to 1 (equal).
    """
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    overlap = width * height
    return overlap / (sum(areas) - overlap)


def grounding_score(prediction: str, box: Sequence[float]) -> float:
    """Return the overlap of the first box in an answer with the true one; unparsable is 0."""
    predicted = parse_boxes(prediction)
    return intersection_over_union(predicted[0], box) if predicted else 0.0


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_box(value: object) -> bool:
    """Whether a value is four numbers with left < right and top < bottom."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        return False
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in value):
        return False
    return bool(value[0] < value[2] and value[1] < value[3])


EXACT = Metric("exact", "answer", "text", _is_text, exact_match)
READING = Metric("ocr", "answer", "text", _is_text, reading_score)
GROUNDING = Metric(
    "grounding",
    "box",
    "four numbers, left < right and top < bottom",
    _is_box,
    grounding_score,
)
METRICS = {metric.name: metric for metric in (EXACT, READING, GROUNDING)}
"""Metrics by name: exact match ignoring case, 1 - character error rate, overlap of boxes."""
