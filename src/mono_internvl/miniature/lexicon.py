"""The words of the small world, and the rule that divides everything into three splits.

A thing of the world (a scene, a chart, a word to read) has a *signature*, a short text that says
all that a question could ask about it. The signature is hashed, so a thing belongs to one split for
ever, whatever the seed and the amount of data: no held-out scene, chart or word can occur in
training, neither as a picture nor described in text.
"""

from __future__ import annotations

import hashlib
import random
import re
from functools import lru_cache
from typing import Final, Literal, TypeAlias

from mono_internvl.miniature.english import load_english

Split: TypeAlias = Literal["train", "validation", "heldout"]

COLOURS: Final = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES: Final = ("circle", "square", "triangle", "star", "cross", "heart", "moon")
SIZES: Final = ("large", "small")
POSITIONS: Final = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
"""The nine cells of a picture in reading order."""

NOVEL_PAIRS: Final = frozenset(
    {
        ("red", "star"),
        ("green", "circle"),
        ("blue", "cross"),
        ("yellow", "triangle"),
        ("purple", "square"),
    }
)
"""Colour-shape pairs that no training record shows, names or asks about."""

SEEN_PAIRS: Final = tuple(
    (colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in NOVEL_PAIRS
)

TEXT_COLOURS: Final = ("black", "white", "grey", "brown", "pink")
"""Colours that occur in text only: a reader of them has to copy, not to guess."""
TEXT_NOUNS: Final = ("lamp", "cup", "boat", "key", "ring", "leaf", "shoe", "bell", "drum", "kite")
"""Things that occur in text only."""
_CONTEXT_NAMES_TEXT = "Anna Ben Clara David Eva Felix Gina Hugo Ida Jan"
CONTEXT_NAMES: Final = tuple(_CONTEXT_NAMES_TEXT.split())
"""People of passing stories; the people of the lasting facts have other names (`facts`)."""

_CONSONANTS = "BCDFGHJKLMNPQRSTVWXZ"
_VOWELS = "AEIOUY"
_PATTERNS = ("CVC", "VCV", "CVCV", "VCVC", "CVCVC", "CVCCV", "VCCVC")


def split_of(signature: str) -> Split:
    """Return the split that a thing of the world belongs to: 80, 8 and 12 in a hundred.

    Args:
        signature: the text that identifies the thing.

    Returns:
        The same split on every machine and for every seed.
    """
    bucket = stable_hash(signature) % 100
    if bucket < 80:
        return "train"
    return "validation" if bucket < 88 else "heldout"


def stable_hash(text: str) -> int:
    """Return 32 bits that depend on the text alone, unlike the built-in `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest())


def sign_split(sign: str) -> Split:
    """Return the split of a word or number to read; what the English text holds is training's."""
    return "train" if sign in _signs_of_english() else split_of(f"word {sign}")


@lru_cache(maxsize=1)
def _signs_of_english() -> frozenset[str]:
    text = " ".join(load_english())
    return frozenset(re.findall(r"\b(?:[A-Z]{3,5}|[0-9]{4})\b", text))


def sample_word(rng: random.Random, split: Split) -> str:
    """Draw a pronounceable nonsense word of three to five capital letters.

    Nonsense, so that it must be read and cannot be guessed; capitals, because the tokenizer gives
    every letter of a capitalised word its own token and one visual token sees about one letter.

    Args:
        rng: source of chance.
        split: words are hashed to splits; only words of this one are returned.

    Returns:
        The word.
    """
    while True:
        pattern = rng.choice(_PATTERNS)
        word = "".join(rng.choice(_CONSONANTS if mark == "C" else _VOWELS) for mark in pattern)
        if sign_split(word) == split:
            return word


def sample_number(rng: random.Random, split: Split) -> str:
    """Draw a number of four digits that belongs to a split.

    Fewer digits would also stand in the boxes of training, which have up to three.

    Args:
        rng: source of chance.
        split: the split to draw from.

    Returns:
        The digits, the first not zero.
    """
    while True:
        number = str(rng.randrange(1000, 10_000))
        if sign_split(number) == split:
            return number


def sample_sign(rng: random.Random, split: Split) -> str:
    """Draw what is written in a picture: a word (two times in three) or a number."""
    return sample_word(rng, split) if rng.random() < 2 / 3 else sample_number(rng, split)


def sample_page(rng: random.Random, split: Split) -> str:
    """Draw one to five words or numbers, separated by spaces: many letters for one picture."""
    return " ".join(sample_sign(rng, split) for _ in range(rng.choice((1, 1, 2, 3, 4, 5))))
