"""How an answer is scored: pure functions of strings and numbers, no model and no files.

`score` looks at a record's `kind` and calls the right one; every score is between 0 and 1 and every
item counts, an unreadable answer as 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from mono_internvl.errors import SampleError
from mono_internvl.processing.prompts import parse_boxes

_PHRASE = re.compile(
    r"^(?:an? )?(?:(?P<size>large|small|\w+(?= \w+ (?!at the )\w+)) )?"
    r"(?:(?P<colour>\w+) )?(?P<shape>\w+)(?: at the (?P<position>.+))?$"
)
_BETWEEN_PHRASES = re.compile(r"\s*,\s*|\s+and\s+")
_MAX_PHRASES = 32  # a caption that repeats itself without end is cut here
_NUM_ATTRIBUTES = 4

Attributes = Sequence[str | None]
"""Size, colour, shape and position of one object; None where a caption does not say."""


@dataclass(frozen=True)
class AttributeCount:
    """What a caption got right, to be added up over captions.

    Attributes:
        correct: attributes named rightly, after the best matching of objects, less one for every
            object too many (may be negative for one caption).
        total: attributes of the true objects.
    """

    correct: int
    total: int

    @property
    def score(self) -> float:
        """Correct over total, not below 0."""
        return max(0, self.correct) / self.total if self.total else 0.0


def normalise(text: str) -> str:
    """Return a text in lower case, without white space or a full stop at its ends."""
    return text.strip().removesuffix(".").strip().lower()


def exact_match(prediction: str, answer: str) -> float:
    """Return 1 if both texts are the same after `normalise`, else 0."""
    return float(normalise(prediction) == normalise(answer))


def edit_distance(first: str, second: str) -> int:
    """Return the least number of characters to insert, delete or replace (Levenshtein)."""
    previous = list(range(len(second) + 1))
    for row, left in enumerate(first, start=1):
        current = [row]
        for column, right in enumerate(second, start=1):
            substituted = previous[column - 1] + (left != right)
            current.append(min(previous[column] + 1, current[column - 1] + 1, substituted))
        previous = current
    return previous[-1]


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
    return max(0.0, 1 - edit_distance(prediction.strip().lower(), truth) / len(truth))


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


def parse_caption(text: str) -> list[Attributes]:
    """Read the objects out of a caption such as `a large red circle at the top left and a ...`.

    Args:
        text: the caption.

    Returns:
        Size, colour, shape and position of each phrase. Words are not checked; a phrase that has
        another form counts as an object of which nothing is known.
    """
    phrases = [part for part in _BETWEEN_PHRASES.split(normalise(text)) if part]
    objects: list[Attributes] = []
    for phrase in phrases[:_MAX_PHRASES]:
        found = _PHRASE.match(phrase)
        names = ("size", "colour", "shape", "position")
        objects.append([found[name] for name in names] if found else [None] * _NUM_ATTRIBUTES)
    return objects


def caption_attributes(prediction: str, truth: Sequence[Attributes]) -> AttributeCount:
    """Count the attributes that a caption names rightly.

    Args:
        prediction: the caption.
        truth: size, colour, shape and position of each true object.

    Returns:
        Right and all attributes, under the matching of named to true objects that is best for the
        caption. Each object named beyond the number of true ones takes one off.
    """
    named = parse_caption(prediction)
    best = {0: 0}  # true objects matched so far, as bits -> most attributes right
    for attributes in named:
        after = dict(best)
        for matched, correct in best.items():
            for index, true in enumerate(truth):
                if matched >> index & 1:
                    continue
                pairs = zip(attributes, true, strict=True)
                right = correct + sum(word is not None and word == want for word, want in pairs)
                key = matched | 1 << index
                after[key] = max(after.get(key, 0), right)
        best = after
    extra = max(0, len(named) - len(truth))
    return AttributeCount(max(best.values()) - extra, _NUM_ATTRIBUTES * len(truth))


def score(record: Mapping[str, object], prediction: str) -> float:
    """Score an answer to an evaluation record.

    Args:
        record: with `kind` and what that kind needs: `attributes` for `caption`, `box` for
            `grounding`, `answer` for `ocr` and for every other kind (exact match).
        prediction: the model's answer.

    Returns:
        0 to 1.

    Raises:
        SampleError: if the record lacks the key that its kind needs, or what is there is no text,
            box or list of attributes.
    """
    kind = record.get("kind")
    needed = {"caption": "attributes", "grounding": "box"}.get(str(kind), "answer")
    truth = record.get(needed)
    if kind is None or truth is None:
        missing = "kind" if kind is None else needed
        raise SampleError(
            f"{record.get('id', 'record')}: no `{missing}` for scoring kind {kind!r}; "
            "add the key to the record"
        )
    is_sound, expected = _SOUND_TRUTHS[needed]
    if not is_sound(truth):
        raise SampleError(
            f"{record.get('id', 'record')}: `{needed}` is {truth!r:.80}; expected {expected}, "
            "correct the record"
        )
    if needed == "attributes":
        return caption_attributes(prediction, cast(list[Attributes], truth)).score
    if needed == "box":
        return grounding_score(prediction, cast(list[float], truth))
    scorer = reading_score if kind == "ocr" else exact_match
    return scorer(prediction, cast(str, truth))


def mean_score(rows: Sequence[Mapping[str, object]]) -> float:
    """Return what a model reaches on all records of one kind.

    Captions are pooled: right attributes of all captions over the attributes of all true objects,
    so that a scene of three things weighs three times as much as a scene of one, and an object too
    many in one caption takes off as much as a wrong word in another.

    Args:
        rows: records with the answer's `score`; captions with the `prediction` itself.

    Returns:
        0 to 1.
    """
    if rows[0]["kind"] != "caption":
        return sum(cast(float, row["score"]) for row in rows) / len(rows)
    counts = [
        caption_attributes(cast(str, row["prediction"]), cast(list[Attributes], row["attributes"]))
        for row in rows
    ]
    return AttributeCount(sum(c.correct for c in counts), sum(c.total for c in counts)).score


def _is_box(value: object) -> bool:
    """Whether a value is four numbers with left < right and top < bottom."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        return False
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in value):
        return False
    return bool(value[0] < value[2] and value[1] < value[3])


def _are_attributes(value: object) -> bool:
    """Whether a value is objects of four words each, a word possibly None."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(
            isinstance(one, list | tuple)
            and len(one) == _NUM_ATTRIBUTES
            and all(word is None or isinstance(word, str) for word in one)
            for one in value
        )
    )


_SOUND_TRUTHS: dict[str, tuple[Callable[[object], bool], str]] = {
    "answer": (lambda value: isinstance(value, str), "text"),
    "box": (_is_box, "four numbers, left < right and top < bottom"),
    "attributes": (_are_attributes, "a list of objects, each size, colour, shape and position"),
}
