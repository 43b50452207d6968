"""What can be in a picture, said in words: scenes of shapes and bar charts, without any pixels.

The sentences made here are used twice: as captions of pictures, and as text that the language model
reads before it has ever seen a picture. Same words, same questions, so that later only the source
of the information changes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mono_internvl.miniature.lexicon import (
    COLOURS,
    POSITIONS,
    SEEN_PAIRS,
    SIZES,
    Split,
    split_of,
    stable_hash,
)

CAPTION_PROMPT = "provide a one-sentence caption for the image"
READ_PROMPT = "Read the text in the image."
RANK_PROMPT = "list the bars from tallest to shortest."

_NUM_OBJECTS = (1, 1, 1, 1, 1, 2, 2, 2, 2, 3)  # 50, 40 and 10 per cent


@dataclass(frozen=True)
class SceneObject:
    """One thing in a scene.

    Attributes:
        size: `"large"` or `"small"`.
        colour: a colour word; empty for a thing of a colour without a name.
        shape: a shape word (in text-only scenes any noun).
        position: one of the nine cells.
    """

    size: str
    colour: str
    shape: str
    position: str

    @property
    def noun(self) -> str:
        """Colour and shape, for example `red circle`; the shape alone where no colour is named."""
        return f"{self.colour} {self.shape}".strip()

    @property
    def attributes(self) -> list[str]:
        """Size, colour, shape and position, as a caption's score wants them."""
        return [self.size, self.colour, self.shape, self.position]


@dataclass(frozen=True)
class Scene:
    """One to three objects in different cells, no two of one colour and shape.

    Attributes:
        objects: in reading order of their cells.
    """

    objects: tuple[SceneObject, ...]

    @property
    def signature(self) -> str:
        """The text that decides the split."""
        return "scene " + self.caption

    @property
    def caption(self) -> str:
        """The one true sentence about the scene."""
        parts = [f"a {o.size} {o.noun} at the {o.position}" for o in self.objects]
        return " and ".join(parts) + "."

    @property
    def split(self) -> Split:
        """The split the scene belongs to.

        Scenes of one object are so few (18 for each colour and shape) that a plain hash would leave
        some pairs out of a split; there, two of the 18 are held out and two are for validation,
        which ones depending on a hash of the pair.
        """
        if len(self.objects) > 1:
            return split_of(self.signature)
        thing = self.objects[0]
        place = POSITIONS.index(thing.position) * len(SIZES) + SIZES.index(thing.size)
        rank = (stable_hash(thing.noun) + 7 * place) % (len(POSITIONS) * len(SIZES))
        return "heldout" if rank < 2 else "validation" if rank < 4 else "train"

    @property
    def attributes(self) -> list[list[str]]:
        """The attributes of all objects."""
        return [o.attributes for o in self.objects]


def without_colours(rng: random.Random, scene: Scene, ratio: float) -> Scene:
    """Take its colour's name from some things, which then have one without a name (`drawing`).

    A shape that is learnt in six colours only may be known by them; here it is its outline alone.

    Args:
        rng: source of chance.
        scene: the scene.
        ratio: of the things that lose the name.

    Returns:
        The scene.
    """
    things = (replace(o, colour="") if rng.random() < ratio else o for o in scene.objects)
    return Scene(tuple(things))


@dataclass(frozen=True)
class Chart:
    """A bar chart with three or four bars of different colours and different values.

    Attributes:
        bars: (colour, value 1 to 9) from left to right.
    """

    bars: tuple[tuple[str, int], ...]

    @property
    def signature(self) -> str:
        """The text that decides the split."""
        return "chart " + self.caption

    @property
    def caption(self) -> str:
        """The one true sentence about the chart."""
        parts = [f"{colour} {value}" for colour, value in self.bars]
        return f"a bar chart with {', '.join(parts[:-1])} and {parts[-1]}."

    @property
    def ranking(self) -> str:
        """The bars with their values, the tallest first."""
        ordered = sorted(self.bars, key=lambda bar: -bar[1])
        return ", ".join(f"{colour} {value}" for colour, value in ordered)


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        kind: what is asked for: colour, shape, count, position, existence, naming or chart.
        form: the wording within the kind.
        text: the question.
        answer: the only right answer.
    """

    kind: str
    form: str
    text: str
    answer: str


def sample_scene(
    rng: random.Random,
    split: Split,
    *,
    pairs: Sequence[tuple[str, str]] = SEEN_PAIRS,
    num_objects: int | None = None,
) -> Scene:
    """Draw a scene that belongs to a split.

    Args:
        rng: source of chance.
        split: the split to draw from.
        pairs: the (colour, shape) pairs to choose among.
        num_objects: how many objects; None draws 1, 2 or 3 with 50, 40 and 10 per cent.

    Returns:
        The scene.
    """
    count = num_objects or rng.choice(_NUM_OBJECTS)
    while True:
        cells = sorted(rng.sample(range(len(POSITIONS)), count))
        chosen = rng.sample(pairs, count)
        objects = tuple(
            SceneObject(rng.choice(SIZES), colour, shape, POSITIONS[cell])
            for cell, (colour, shape) in zip(cells, chosen, strict=True)
        )
        scene = Scene(objects)
        if scene.split == split:
            return scene


def sample_chart(rng: random.Random, split: Split) -> Chart:
    """Draw a chart that belongs to a split.

    Args:
        rng: source of chance.
        split: the split to draw from.

    Returns:
        The chart.
    """
    while True:
        count = rng.choice((3, 4))
        colours = rng.sample(COLOURS, count)
        chart = Chart(tuple(zip(colours, rng.sample(range(1, 10), count), strict=True)))
        if split_of(chart.signature) == split:
            return chart
