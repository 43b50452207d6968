"""Pictures of the world on disk, each with what is true about it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from mono_internvl.miniature.drawing import Box, Drawing, draw_chart, draw_scene, draw_sign
from mono_internvl.miniature.lexicon import Split, sample_page
from mono_internvl.miniature.scenes import (
    Chart,
    Scene,
    sample_chart,
    sample_scene,
    without_colours,
)

_PNG_COMPRESSION = 1  # flat colours: small enough, and fast

Content = TypeVar("Content", Scene, Chart, str)


@dataclass(frozen=True)
class Picture(Generic[Content]):
    """A picture that was written.

    Attributes:
        path: below the data root.
        content: the scene, the chart or the text that it shows.
        boxes: one for each object of a scene, bar of a chart or word of a sign.
        is_aligned: whether its things sit on the token grid.
    """

    path: str
    content: Content
    boxes: tuple[Box, ...]
    is_aligned: bool


class Album:
    """Writes numbered pictures of one stage into `images/<name>/`.

    Args:
        root: the data root.
        name: the folder of the stage.
        rng: source of the jitter and of the shades.
    """

    def __init__(self, root: Path, name: str, rng: random.Random) -> None:
        self._root = root
        self._folder = f"images/{name}"
        self._rng = rng
        self._count = 0
        (root / self._folder).mkdir(parents=True, exist_ok=True)

    def scene(self, scene: Scene, is_aligned: bool = False) -> Picture[Scene]:
        """Draw and write a scene."""
        drawing = draw_scene(scene, self._rng, is_aligned)
        return Picture(self._write(drawing), scene, drawing.boxes, is_aligned)

    def chart(self, chart: Chart, is_aligned: bool = False) -> Picture[Chart]:
        """Draw and write a chart."""
        drawing = draw_chart(chart, self._rng, is_aligned)
        return Picture(self._write(drawing), chart, drawing.boxes, is_aligned)

    def sign(self, text: str, is_aligned: bool = False) -> Picture[str]:
        """Draw and write words or numbers."""
        drawing = draw_sign(text, self._rng, is_aligned)
        return Picture(self._write(drawing), text, drawing.boxes, is_aligned)

    def scenes(
        self,
        split: Split,
        count: int,
        unnamed_ratio: float = 0.0,
        *,
        num_objects: int | None = None,
    ) -> list[Picture[Scene]]:
        """Draw and write random scenes of a split; `unnamed_ratio` of the things lose a colour."""

        def draw() -> Picture[Scene]:
            scene = sample_scene(self._rng, split, num_objects=num_objects)
            return self.scene(without_colours(self._rng, scene, unnamed_ratio))

        return _repeat(count, draw)

    def charts(self, split: Split, count: int) -> list[Picture[Chart]]:
        """Draw and write random charts of a split."""
        return _repeat(count, lambda: self.chart(sample_chart(self._rng, split)))

    def pages(self, split: Split, count: int) -> list[Picture[str]]:
        """Draw and write signs of one to five random words and numbers of a split."""
        return _repeat(count, lambda: self.sign(sample_page(self._rng, split)))

    def _write(self, drawing: Drawing) -> str:
        path = f"{self._folder}/{self._count:06d}.png"
        self._count += 1
        drawing.image.save(self._root / path, compress_level=_PNG_COMPRESSION)
        return path


_Made = TypeVar("_Made")


def _repeat(count: int, make: Callable[[], _Made]) -> list[_Made]:
    return [make() for _ in range(count)]
