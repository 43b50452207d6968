"""Questions about scenes and charts, with every answer equally frequent.

A deck holds the answers still to be asked for; each card is dealt once before the deck is shuffled
anew. For a card, scenes are drawn until one fits. So the answers of a kind are balanced exactly
(existence: half yes, half no, for each thing asked about), and a blind guesser gains nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
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
    """

    def __init__(self, kind: str, rng: random.Random) -> None:
        if kind not in QUESTION_KINDS:
            raise ValueError(f"kind: got {kind!r}, expected one of {QUESTION_KINDS}")
        self._kind = kind
        self._rng = rng
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
            groups = _groups(self._kind)
            self._rng.shuffle(groups)
            for group in groups:
                self._rng.shuffle(group)
                self._deck.extend(group)
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


def question_about(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """Ask any one question of a kind that fits a scene (for dialogues; not balanced).

    Args:
        scene: the scene.
        kind: one of `SCENE_KINDS`.
        rng: source of chance.

    Returns:
        The question, or None if the scene allows none of the kind.
    """
    cards = [card for group in _groups(kind) for card in group]
    if kind == "existence":
        half = rng.choice(("yes", "no"))
        cards = [card for card in cards if card.answer == half]
    rng.shuffle(cards)
    matches = (_match_scene(scene, card, False, rng) for card in cards)
    return next((question for question in matches if question is not None), None)


def _match_scene(scene: Scene, card: _Card, near_miss: bool, rng: random.Random) -> Question | None:
    """Ask about the scene so that the card's answer is right, or return None."""
    objects = scene.objects
    text = None
    if card.kind == "count":
        text = "how many objects are there?" if len(objects) == int(card.answer) else None
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
    thing = "object" if card.form == "colour" else ""
    return f"is there a {' '.join([*words, thing]).strip()}?"


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
