"""Which things are named, what collections call them, and what is never named."""

from __future__ import annotations

from drawings import Concept

FORTY = (
    *("red apple", "lemon", "grapes", "pear", "strawberry", "cherries", "banana"),
    *("bear", "chicken", "dolphin", "horse", "pig", "honeybee", "lady beetle", "tiger", "mouse"),
    *("rabbit", "penguin", "cow", "goat", "elephant", "frog", "snail"),
    *("house", "bus", "fire engine", "airplane", "tent", "guitar", "violin", "scissors"),
    *("wrench", "hammer", "key", "camera", "balloon", "soccer ball", "star", "sun", "fire"),
)
"""Things that nearly all artists have drawn and that both test collections hold, too."""
NEVER_NAMED = (
    *("cat", "dog", "fish", "whale", "turtle", "cactus", "mushroom", "watermelon", "pizza"),
    *("rose", "tomato", "carrot", "bicycle", "sailboat", "helicopter", "umbrella", "crown"),
    *("bell", "trophy", "telephone"),
)
"""Things in no training record, of any size: what is said of them shows what is only guessed."""
_OTHER_NAMES = {
    "red apple": ("apple",),
    "cherries": ("cherry",),
    "honeybee": ("bee", "honey bee", "bumble bee"),
    "lady beetle": ("ladybug", "ladybird"),
    "fire engine": ("fire truck",),
    "airplane": ("plane", "aeroplane", "jet"),
    "house": ("home",),
    "chicken": ("hen", "rooster"),
}
_OTHER_THINGS = (
    *("hot air balloon", "speech balloon", "thought balloon", "computer mouse", "light house"),
    *("rocking horse", "sea horse", "teddy bear", "polar bear", "spinning star", "guinea pig"),
    *("black key", "music key", "sign for the letter", "green apple", "custard apple"),
    *("scream balloon", "edward bear", "keyboard key", "butterfly from star", "north star"),
    *("closest to the sun", "fire fire fire"),
    *("granny smith apple", "star fruit", "jelly bean bear", "bird house", "dog house"),
)
"""Titles that end in the name of something which they do not show."""
_FEWEST_ARTISTS = 7
_NAMEABLE = ("animals-nature", "food-drink", "travel-places", "objects", "activities")


def known_names(concepts: dict[str, Concept], artists: dict[str, int], count: int) -> list[str]:
    """The things that are named in training.

    Args:
        concepts: All, by name.
        artists: Name -> training artists who have drawn it.
        count: 40 are `FORTY`; more are those and further ones, by how many have drawn them.
    """
    rest = sorted(
        (
            name
            for name, drawn_by in artists.items()
            if drawn_by >= _FEWEST_ARTISTS
            and concepts[name].group in _NAMEABLE
            and name not in NEVER_NAMED
            and name not in FORTY
        ),
        key=lambda name: (-artists[name], name),
    )
    return [*FORTY, *rest][:count]


def thing_in(title: str, names: list[str]) -> str | None:
    """The named thing that a title of a test collection ends in; None if it is no named one."""
    if title.endswith(_OTHER_THINGS):
        return None
    for name in names:
        for word in (name, *_OTHER_NAMES.get(name, ())):
            if title == word or title.endswith(f" {word}"):
                return name
    return None


def is_animal(concept: Concept) -> bool:
    """Whether Unicode groups a thing among the animals."""
    return concept.subgroup.startswith("animal")
