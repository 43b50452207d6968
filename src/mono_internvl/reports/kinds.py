"""What the kinds of held-out tasks are called, how they are scored, and their order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of task as a reader meets it.

    Attributes:
        name: the word in the records.
        title: heading.
        measure: what its score, in [0, 1], means.
        full_marks: least score that counts as right; below it an answer is partly right or wrong.
        is_graded: whether a score between 0 and `full_marks` is partly right, rather than wrong.
    """

    name: str
    title: str
    measure: str
    full_marks: float = 0.999
    is_graded: bool = False


_KINDS = (
    Kind("caption", "Caption", "true attributes named", is_graded=True),
    Kind("colour", "Colour", "exact match"),
    Kind("shape", "Shape", "exact match"),
    Kind("count", "Count", "exact match"),
    Kind("position", "Position", "exact match"),
    Kind("existence", "Existence", "yes or no"),
    Kind("naming", "Naming", "exact match"),
    Kind("novel", "Unseen pairs", "pairs never trained on"),
    Kind("grounding", "Grounding", "mean IoU of the box", full_marks=0.5),
    Kind("ocr", "Reading (OCR)", "1 − char. error rate", is_graded=True),
    Kind("chart", "Charts", "exact match"),
)
TEXT_KINDS = frozenset({"name_qa", "fact_cloze", "reading_qa", "copying", "lookup"})
"""Kinds without an image; they tell how the language is."""

_BY_NAME = {kind.name: kind for kind in _KINDS}


def kind_named(name: str) -> Kind:
    """Return the kind of that name; one that nobody described gets its own name as its title."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    return Kind(name, name.replace("_", " ").capitalize(), "score")


def in_order(names: Iterable[str]) -> list[Kind]:
    """Return the kinds of these names: the described ones first, the others by name."""
    rank = {kind.name: position for position, kind in enumerate(_KINDS)}
    ordered = sorted(set(names), key=lambda name: (rank.get(name, len(rank)), name))
    return [kind_named(name) for name in ordered]
