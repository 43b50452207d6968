"""Made-up clips: what moved, where to, and what came first, of which no single frame tells.

Half way every clip shows both of its things, where they might be whichever of them moves and
whichever came first.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from mono_internvl.errors import MissingDependency
from mono_internvl.miniature.drawing import IMAGE_SIZE_PX, background, paste_thing
from mono_internvl.miniature.lexicon import SEEN_PAIRS
from mono_internvl.miniature.records import Record

NUM_FRAMES: Final = 10
DIRECTIONS: Final = ("left", "right", "up", "down")
_DIAMETER_PX = 40
_LANES_PX = (22, 106)  # of the upper or left and of the lower or right thing
_MIDDLES_PX = (40, 88)  # where a thing may be half way
_REACH_PX = 36  # of a thing that moves, to either side of where it is half way
_SECOND_FRAME = 4  # a second thing comes in the last frame before the middle one
_RATE = 5

Thing = tuple[str, str]
"""Colour and shape."""


@dataclass(frozen=True)
class Clip:
    """Two things, of which one moves or one comes later.

    Attributes:
        things: In the upper or left lane, and in the lower or right one.
        actor: Which of them moves, or is there from the first frame on.
        direction: Where to; None where one comes later.
        is_upright: Whether lanes stand side by side.
        middles: Where the things are half way, px along their lanes.
    """

    things: tuple[Thing, Thing]
    actor: int
    direction: str | None
    is_upright: bool
    middles: tuple[int, int]

    def questions(self) -> list[tuple[str, str, str]]:
        """Kind, question and answer."""
        first, second = (" ".join(thing) for thing in self.things)
        acted = (first, second)[self.actor]
        if self.direction is None:
            return [("first", f"which came first, the {first} or the {second}?", acted)]
        return [
            ("moved", f"which moved, the {first} or the {second}?", acted),
            ("where", f"where did the {acted} move?", self.direction),
        ]

    def draw(self, rng: random.Random) -> list[Image.Image]:
        """Its frames, on one background."""
        empty = background(rng)
        frames = []
        for number in range(NUM_FRAMES):
            frame = empty.copy()
            for place, thing in enumerate(self.things):
                is_actor = place == self.actor
                if self.direction is None and not is_actor and number < _SECOND_FRAME:
                    continue
                along = self.middles[place] + (self._shift(number) if is_actor else 0)
                across = _LANES_PX[place]
                at = (across, along) if self.is_upright else (along, across)
                paste_thing(frame, thing, _DIAMETER_PX, at)
            frames.append(frame)
        return frames

    def _shift(self, number: int) -> int:
        if self.direction is None:
            return 0
        sign = 1 if self.direction in ("right", "down") else -1
        return round(sign * _REACH_PX * (number - NUM_FRAMES / 2) / (NUM_FRAMES / 2))


def sample_clip(rng: random.Random, number: int) -> Clip:
    """A clip; every third is of what came first, in the others things move all ways by turns."""
    first, second = rng.sample(SEEN_PAIRS, 2)
    direction = None if number % 3 == 2 else DIRECTIONS[number % len(DIRECTIONS)]
    is_upright = rng.random() < 0.5 if direction is None else direction in ("up", "down")
    middles = (rng.randint(*_MIDDLES_PX), rng.randint(*_MIDDLES_PX))
    return Clip((first, second), rng.randrange(2), direction, is_upright, middles)


def clip_records(root: Path, name: str, count: int, seed: int) -> Iterator[Record]:
    """Writes clips into `clips/<name>/`, and a record for each of their questions.

    Args:
        root: The data root.
        name: Of the split; the same name and seed draw the same clips.
        count: Clips.
        seed: Of the draws.
    """
    rng = random.Random(f"{seed}/clips/{name}")
    for number in range(count):
        clip = sample_clip(rng, number)
        path = f"clips/{name}/{number:05d}.mp4"
        write_video(root / path, clip.draw(rng))
        for kind, question, answer in clip.questions():
            talk = [
                {"from": "human", "value": f"<video>\n{question}"},
                {"from": "gpt", "value": answer},
            ]
            yield {
                "video": path,
                "conversations": talk,
                "kind": kind,
                "metric": "exact",
                "answer": answer,
            }


def write_video(file: Path, frames: Sequence[Image.Image]) -> None:
    """Write frames as MPEG-4.

    Raises:
        MissingDependency: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingDependency(
            "PyAV is not installed; pip install 'mono-internvl[video]' writes videos"
        ) from error
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=_RATE)
        stream.width = stream.height = IMAGE_SIZE_PX
        stream.pix_fmt, stream.bit_rate = "yuv420p", 1_000_000
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
