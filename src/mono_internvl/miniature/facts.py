"""Lasting facts about invented people: what the language model knows and must not forget.

The facts do not depend on any seed, because the shipped language model has learnt them. Half of
the people are *replayed* (their facts occur again in the text of stage 2), half are *never
replayed* (they show what vision training alone leaves intact).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final


def _words(text: str, separator: str | None = None) -> tuple[str, ...]:
    return tuple(text.split(separator))


_NAMES = _words(
    "Mira Orlo Tessa Bruk Nilo Sanja Ravik Ilka Dorn Pella Yaro Vesna Kelm Osha Lumo Zarek Fenna "
    "Gorin Hale Sivi Brona Edvar Quill Runa Tamsin Ulf Wenda Xeno Ysolt Zubin Alba Corvo Dessa "
    "Elmo Fiora Grit Hanno Imre Jarla Kosta"
)
_TOWNS = _words(
    "Torvald Maresk Ulmen Brightwater Sorrel Kestrel Vantor Ebbing Dunmoor Larkhill Oskar Pellham "
    "Quarry Redfen Silvan Thorpe"
)
_ANIMALS = _words("owl goat cat raven pony hare fox toad")
_COLOURS = _words("grey brown black white golden spotted")
_JOBS = _words("baker pilot weaver miner doctor painter sailor teacher judge farmer")
_FOODS = _words(
    "plum soup,rye bread,goat cheese,fried fish,honey cake,cold rice,apple pie,bean stew", ","
)

_RELATIONS: Final = {
    "lives in": ("lives in", "where does {name} live?"),
    "keeps": ("keeps a", "what does {name} keep?"),
    "works as": ("works as a", "what does {name} work as?"),
    "likes": ("likes", "what does {name} like?"),
}
_FACTS_PER_PERSON = 2


@dataclass(frozen=True)
class Fact:
    """One fact about one person.

    Attributes:
        name: the person.
        relation: key of the relation, for example `lives in`.
        value: for example `Torvald`.
        is_replayed: whether stage 2 repeats it.
    """

    name: str
    relation: str
    value: str
    is_replayed: bool

    @property
    def cloze(self) -> str:
        """The statement without its end, for example `Mira lives in`."""
        return f"{self.name} {_RELATIONS[self.relation][0]}"

    @property
    def statement(self) -> str:
        """The whole sentence."""
        return f"{self.cloze} {self.value}."

    @property
    def question(self) -> str:
        """The question whose answer is the value."""
        return _RELATIONS[self.relation][1].format(name=self.name)


def _make_facts() -> tuple[Fact, ...]:
    rng = random.Random("facts of the miniature")
    values = {
        "lives in": list(_TOWNS),
        "keeps": [f"{colour} {animal}" for colour in _COLOURS for animal in _ANIMALS],
        "works as": list(_JOBS),
        "likes": list(_FOODS),
    }
    facts: list[Fact] = []
    for index, name in enumerate(_NAMES):
        for relation in rng.sample(sorted(_RELATIONS), _FACTS_PER_PERSON):
            facts.append(Fact(name, relation, rng.choice(values[relation]), index % 2 == 0))
    return tuple(facts)


FACTS: Final = _make_facts()
"""All facts, two for each of forty people."""


def facts_of(is_replayed: bool) -> tuple[Fact, ...]:
    """Return the facts that stage 2 repeats, or those that it never repeats."""
    return tuple(fact for fact in FACTS if fact.is_replayed == is_replayed)


def statements_of(name: str) -> str:
    """Return everything that is known about a person, as one line of text."""
    return " ".join(fact.statement for fact in FACTS if fact.name == name)
