"""Questions about scenes and charts, with every answer equally frequent.

A deck holds the answers still to be asked for; each card is dealt once before the deck is shuffled
anew. For a card, scenes are drawn until one fits. So the answers of a kind are balanced exactly
(existence: half yes, half no, for each thing asked about), and a blind guesser gains nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from mono_internvl.errors import SampleError
from mono_internvl.miniature.lexicon import COLOURS, POSITIONS, SEEN_PAIRS, SHAPES
from mono_internvl.miniature.scenes import Chart, Question, Scene

SCENE_KINDS: Final = ("colour", "shape", "count", "position", "existence", "naming")
"""Kinds of questions about scenes."""
QUESTION_KINDS: Final = (*SCENE_KINDS, "chart")

_NEAR_MISS_SHARE = 0.6  # of the "no" answers to pairs: the colour or the shape alone is there
_MAX_DRAWS = 100_000

Thing = TypeVar("Thing", Scene, Chart)


@dataclass(frozen=True)
class _Card:
    """An answer to be asked for; `subject` is the thing whose existence is asked."""

    kind: str
    form: str
    answer: str
    subject: str = ""


def _groups(kind: str) -> list[list[_Card]]:
    """All cards of a kind, in groups that are dealt together."""
    if kind == "existence":
        pairs = [f"{colour} {shape}" for colour, shape in SEEN_PAIRS]
        subjects = [("colour", word) for word in COLOURS * 4]
        subjects += [("shape", word) for word in SHAPES * 5] + [("pair", pair) for pair in pairs]
        return [[_Card(kind, f, answer, s) for answer in ("yes", "no")] for f, s in subjects]
    answers: dict[str, dict[str, tuple[str, ...]]] = {
        "colour": {"of shape": COLOURS},
        "shape": {"of colour": SHAPES},
        "count": {"all": ("1", "2", "3")},
        "position": {"of pair": POSITIONS},
        "naming": {
            "this": tuple(f"{colour} {shape}" for colour, shape in SEEN_PAIRS),
            "place": tuple(f"{colour} {shape}" for colour, shape in SEEN_PAIRS),
        },
        "chart": {
            "tallest": COLOURS,
            "shortest": COLOURS,
            "value": tuple(str(value) for value in range(1, 10)),
        },
    }
    forms = answers[kind]
    if kind == "chart":  # six colours, nine values: three decks of the ones, two of the others
        copies = {"tallest": 3, "shortest": 3, "value": 2}
        return [[_Card(kind, f, a) for a in forms[f]] for f in forms for _ in range(copies[f])]
    return [[_Card(kind, form, answer) for answer in words] for form, words in forms.items()]


class BalancedAsker:
    """Deals questions of one kind, every answer equally often.

    Args:
        kind: one of `QUESTION_KINDS`.
        rng: source of chance.
        forms: which wordings of the kind; all by default.
    """

    def __init__(self, kind: str, rng: random.Random, forms: Sequence[str] | None = None) -> None:
        if kind not in QUESTION_KINDS:
            raise ValueError(f"kind: got {kind!r}, expected one of {QUESTION_KINDS}")
        self._rng = rng
        self._groups = [g for g in _groups(kind) if forms is None or g[0].form in forms]
        if not self._groups:
            raise ValueError(f"forms: got {forms!r}, none of them a wording of {kind!r}")
        self._deck: list[_Card] = []

    def ask(self, draw: Callable[[], Thing]) -> tuple[Thing, Question]:
        """Deal the next answer and find something to ask it about.

        Args:
            draw: returns a random scene (or chart, for the kind `chart`).

        Returns:
            The scene or chart, and the question.

        Raises:
            SampleError: if nothing that is drawn ever fits the answer.
        """
        if not self._deck:
            groups = [list(cards) for cards in self._groups]
            self._rng.shuffle(groups)
            for cards in groups:
                self._rng.shuffle(cards)
                self._deck.extend(cards)
        card = self._deck.pop()
        near_miss = card.form == "pair" and self._rng.random() < _NEAR_MISS_SHARE
        for _ in range(_MAX_DRAWS):
            thing = draw()
            if isinstance(thing, Scene):
                question = _match_scene(thing, card, near_miss, self._rng)
            else:
                question = _match_chart(thing, card, self._rng)
            if question is not None:
                return thing, question
        raise SampleError(
            f"{card.kind}: no scene among {_MAX_DRAWS} draws has the answer {card.answer!r} "
            f"{card.subject}; draw from a larger pool"
        )


def further_questions(
    scene: Scene,
    rng: random.Random,
    count: int,
    *,
    asked: str = "",
    pairs: Sequence[tuple[str, str]] = SEEN_PAIRS,
) -> list[Question]:
    """Ask several things about one scene (for dialogues; not balanced).

    Besides the kinds of `SCENE_KINDS` there are colour, shape and size of the thing at a place:
    their wording gives away neither colour nor shape. No answer was said before in the dialogue, so
    each has to be looked up anew.

    Args:
        scene: the scene.
        rng: source of chance.
        count: how many questions, fewer if the scene allows no more.
        asked: what was said before: it is not repeated, and nothing is asked for that it says.
        pairs: (colour, shape) pairs whose existence may be asked.

    Returns:
        Questions of different wording.
    """
    found = {"count": Question("count", "all", *_counting(scene))}
    existence = _existence(scene, rng, pairs)
    found["existence"] = Question("existence", "any", *existence)
    for kind in ("colour at", "shape at", "size at", "colour", "shape", "position", "naming"):
        thing = rng.choice(scene.objects)
        alone = len(scene.objects) == 1 and rng.random() < 0.5
        place = "this" if alone else f"the object at the {thing.position}"
        text, answer = {
            "colour at": (f"what colour is {place}?", thing.colour),
            "shape at": (f"what shape is {place}?", thing.shape),
            "size at": (f"what size is {place}?", thing.size),
            "colour": (f"what colour is the {thing.shape}?", thing.colour),
            "shape": (f"what shape is the {thing.colour} object?", thing.shape),
            "position": (f"where is the {thing.noun}?", thing.position),
            "naming": (f"what is at the {thing.position}?", thing.noun),
        }[kind]
        like = [o for o in scene.objects if o is not thing]
        is_clear = not (
            (kind == "colour" and any(o.shape == thing.shape for o in like))
            or (kind == "shape" and any(o.colour == thing.colour for o in like))
        )
        if is_clear:
            found[kind] = Question(kind, "any", text, answer)
    said, chosen = {*asked.replace("?", " ").split()}, list[Question]()
    for question in rng.sample(list(found.values()), len(found)):
        is_new = question.kind in ("count", "existence") or not said.issuperset(
            question.answer.split()
        )
        if is_new and question.text not in asked and len(chosen) < count:
            chosen.append(question)
            said.update([*question.text.rstrip("?").split(), *question.answer.split()])
    return chosen


def _counting(scene: Scene) -> tuple[str, str]:
    return "how many objects are there?", str(len(scene.objects))


def _existence(
    scene: Scene, rng: random.Random, pairs: Sequence[tuple[str, str]]
) -> tuple[str, str]:
    """Ask for a colour, a shape or a pair; half the answers are yes."""
    answer = rng.choice(("yes", "no"))
    form = rng.choice(("colour", "shape", "pair"))
    held: dict[str, list[str]] = {
        "colour": [o.colour for o in scene.objects],
        "shape": [o.shape for o in scene.objects],
        "pair": [o.noun for o in scene.objects],
    }
    every: dict[str, list[str]] = {
        "colour": sorted({colour for colour, _ in pairs}),
        "shape": sorted({shape for _, shape in pairs}),
        "pair": [f"{colour} {shape}" for colour, shape in pairs],
    }
    subject = rng.choice(held[form])
    if answer == "no":
        absent = [word for word in every[form] if word not in held[form]]
        parts = {*held["colour"], *held["shape"]}
        near = [word for word in absent if parts.intersection(word.split())]
        is_near = form == "pair" and near and rng.random() < _NEAR_MISS_SHARE
        subject = rng.choice(near if is_near else absent)
    return _existence_question(subject, form), answer


def _existence_question(subject: str, form: str) -> str:
    thing = f"{subject} object" if form == "colour" else subject
    article = "an" if thing[0] in "aeiou" else "a"
    return f"is there {article} {thing}?"


def further_chart_questions(
    chart: Chart, rng: random.Random, count: int, *, first: Question
) -> list[Question]:
    """Ask more of the same about one chart (for dialogues; not balanced).

    After a comparison comes the other one, after a value come the others. Mixed, each would give
    the other away: who knows all values need not look for the tallest bar.

    Args:
        chart: the chart.
        rng: source of chance.
        count: how many questions, fewer if there are no more.
        first: the question before.

    Returns:
        Questions of different wording.
    """
    ordered = sorted(chart.bars, key=lambda bar: bar[1])
    found = [
        Question("chart", "tallest", "which bar is tallest?", ordered[-1][0]),
        Question("chart", "shortest", "which bar is shortest?", ordered[0][0]),
    ]
    if first.form == "value":
        found = [
            Question("chart", "value", f"what is the value of the {colour} bar?", str(value))
            for colour, value in chart.bars
        ]
    found = [question for question in found if question.text != first.text]
    return rng.sample(found, len(found))[:count]


def _match_scene(scene: Scene, card: _Card, near_miss: bool, rng: random.Random) -> Question | None:
    """Ask about the scene so that the card's answer is right, or return None."""
    objects = scene.objects
    text = None
    if card.kind == "count":
        question, answer = _counting(scene)
        text = question if answer == card.answer else None
    elif card.kind == "existence":
        text = _match_existence(scene, card, near_miss)
    elif card.kind == "naming" and card.form == "this":
        text = "what is this?" if [o.noun for o in objects] == [card.answer] else None
    elif card.kind == "naming":
        places = [o.position for o in objects if o.noun == card.answer]
        text = f"what is at the {places[0]}?" if places else None
    elif card.kind == "position":
        nouns = [o.noun for o in objects if o.position == card.answer]
        text = f"where is the {nouns[0]}?" if nouns else None
    elif card.kind == "colour":
        shapes = [o.shape for o in objects]
        unique = [o for o in objects if shapes.count(o.shape) == 1]
        fits = [o.shape for o in unique if o.colour == card.answer]
        text = f"what colour is the {rng.choice(fits)}?" if fits else None
    elif card.kind == "shape":
        colours = [o.colour for o in objects]
        unique = [o for o in objects if colours.count(o.colour) == 1]
        fits = [o.colour for o in unique if o.shape == card.answer]
        text = f"what shape is the {rng.choice(fits)} object?" if fits else None
    return Question(card.kind, card.form, text, card.answer) if text else None


def _match_existence(scene: Scene, card: _Card, near_miss: bool) -> str | None:
    words = card.subject.split()
    held = {
        "colour": [o.colour for o in scene.objects],
        "shape": [o.shape for o in scene.objects],
        "pair": [o.noun for o in scene.objects],
    }[card.form]
    is_there = card.subject in held
    if is_there != (card.answer == "yes"):
        return None
    parts = {word for o in scene.objects for word in (o.colour, o.shape)}
    if near_miss and not parts.intersection(words):
        return None
    return _existence_question(card.subject, card.form)


def _match_chart(chart: Chart, card: _Card, rng: random.Random) -> Question | None:
    ordered = sorted(chart.bars, key=lambda bar: bar[1])
    text = None
    if card.form == "tallest" and ordered[-1][0] == card.answer:
        text = "which bar is tallest?"
    elif card.form == "shortest" and ordered[0][0] == card.answer:
        text = "which bar is shortest?"
    elif card.form == "value":
        fits = [colour for colour, value in chart.bars if str(value) == card.answer]
        text = f"what is the value of the {rng.choice(fits)} bar?" if fits else None
    return Question(card.kind, card.form, text, card.answer) if text else None
