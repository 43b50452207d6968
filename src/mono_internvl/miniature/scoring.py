"""The miniature as a benchmark: its kinds of questions, the grammar of its captions, its protocol.

Everything that evaluates the miniature, quickstart and labs alike, asks under `PROTOCOL`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mono_internvl.evaluation.benchmark import Benchmark, Mean
from mono_internvl.evaluation.metrics.metric import EXACT, GROUNDING, READING, Metric, normalise
from mono_internvl.evaluation.protocol import Protocol
from mono_internvl.miniature.asking import QUESTION_KINDS
from mono_internvl.runs.predictions import Prediction

TEXT_KINDS = ("name_qa", "fact_cloze", "reading_qa", "copying", "lookup")
"""Kinds without an image; they tell how the language is."""

PROTOCOL = Protocol(max_new_tokens=64)  # a caption of three things has about 40

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


def pooled_captions(predictions: Sequence[Prediction]) -> float:
    """Right attributes of all captions over the attributes of all true objects.

    So a scene of three things weighs three times as much as a scene of one, and an object too many
    in one caption takes off as much as a wrong word in another.
    """
    counts = [
        caption_attributes(one.text, cast(list[Attributes], one.record["attributes"]))
        for one in predictions
    ]
    return AttributeCount(sum(c.correct for c in counts), sum(c.total for c in counts)).score


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


CAPTION = Metric(
    "caption",
    "attributes",
    "a list of objects, each size, colour, shape and position",
    _are_attributes,
    lambda prediction, truth: caption_attributes(prediction, truth).score,
    pooled_captions,
)


def _group(record: Mapping[str, Any]) -> str:
    """The kind; facts that the last stage repeats are told from those that it does not."""
    if record["kind"] == "fact_cloze":
        return "facts_replayed" if record["is_replayed"] else "facts_never_replayed"
    return str(record["kind"])


BENCHMARK = Benchmark(
    name="miniature",
    metrics={
        "caption": CAPTION,
        "grounding": GROUNDING,
        "ocr": READING,
        **dict.fromkeys((*QUESTION_KINDS, "novel", *TEXT_KINDS), EXACT),
    },
    protocols={"default": PROTOCOL},
    group=_group,
)


def mean_scores(
    predictions: Iterable[Prediction], *, blind: bool = False, aligned: bool = False
) -> dict[str, Mean]:
    """What was reached in every kind, by name of the kind.

    Args:
        predictions: Of one stage.
        blind: Those with hidden images, instead of those with images.
        aligned: Those on pictures whose parts are aligned with the patches, instead of the others.
    """
    chosen = (
        one
        for one in predictions
        if one.is_blind == blind and bool(one.record.get("aligned")) == aligned
    )
    return dict(sorted(BENCHMARK.mean_scores(chosen).items()))
