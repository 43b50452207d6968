"""Questions that are answered in steps: count of each kind, then add; read two bars, then subtract.

Every step is a paragraph, and the result stands behind "final answer:".
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mono_internvl.miniature.lexicon import SHAPES, Split
from mono_internvl.miniature.pictures import Album, Picture
from mono_internvl.miniature.records import Record, make_record
from mono_internvl.miniature.scenes import Chart, Scene, sample_chart, sample_scene

STEP_KINDS: Final = ("adding", "difference")


def adding_pairs(scene: Scene, total: int) -> list[tuple[str, str]]:
    """The pairs of shapes of which there are so many together; the first is in the picture."""
    shapes = [thing.shape for thing in scene.objects]
    return [
        (one, two)
        for one in dict.fromkeys(shapes)
        for two in SHAPES
        if two != one and shapes.count(one) + shapes.count(two) == total
    ]


def adding_record(picture: Picture[Scene], asked: Sequence[str]) -> Record:
    """Make a question for how many there are of two shapes together."""
    shapes = [thing.shape for thing in picture.content.objects]
    one, two = (shapes.count(shape) for shape in asked)
    question = f"how many {_many(asked[0])} and {_many(asked[1])} are there together?"
    steps = [f"{_many(asked[0])}: {one}", f"{_many(asked[1])}: {two}", f"{one} + {two} ="]
    return _record("adding", question, steps, one + two, picture.path)


def difference_record(rng: random.Random, picture: Picture[Chart]) -> Record:
    """Make a question for by how much one of two bars is taller than the other."""
    bars = rng.sample(picture.content.bars, 2)
    (first, one), (second, two) = bars
    high, low = max(one, two), min(one, two)
    question = f"what is the difference of the {first} bar and the {second} bar?"
    steps = [f"{first}: {one}", f"{second}: {two}", f"{high} - {low} ="]
    return _record("difference", question, steps, high - low, picture.path)


def step_records(root: Path, name: str, split: Split, count: int, seed: int) -> list[Record]:
    """Draw pictures of a split and ask about them in steps.

    Args:
        root: the data root.
        name: of the folder of the pictures, and of the draws.
        split: of the pictures.
        count: records of each kind.
        seed: seed of the draws.

    Returns:
        The records, kinds by turns; `answer` is the result alone.
    """
    rng = random.Random(f"{seed}/steps/{name}")
    album = Album(root, name, rng)
    records = []
    for number in range(count):
        pairs: list[tuple[str, str]] = []
        while not pairs:  # every sum equally often
            scene = sample_scene(rng, split)
            pairs = adding_pairs(scene, 1 + number % 3)
        asked = rng.sample(rng.choice(pairs), 2)
        records.append(adding_record(album.scene(scene), asked))
        records.append(difference_record(rng, album.chart(sample_chart(rng, split))))
    return records


def _many(shape: str) -> str:
    return f"{shape}s"


def _record(kind: str, question: str, steps: list[str], result: int, image: str) -> Record:
    text = "\n\n".join([*steps[:-1], f"{steps[-1]} {result}", f"final answer: {result}"])
    return {
        **make_record(kind, [(question, text)], image),
        "metric": "exact",
        "answer": str(result),
    }
