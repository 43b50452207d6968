"""How an image is cut and how it stands in a prompt: what every tiling says about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from mono_internvl.processing.prompts import IMAGE_CONTEXT


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of one image, between `<img>` and `</img>`. Whoever needs a count asks here.

    Attributes:
        num_tiles: Crops that the model reads, in the order of `Tiling.cut`.
        runs: Visual tokens that stand side by side: of a tile, or of a row of the whole image.
        separator: Token of the vocabulary between two runs; "" where they touch.
    """

    num_tiles: int
    runs: tuple[int, ...]
    separator: str = ""

    @property
    def num_visual_tokens(self) -> int:
        """Tokens that stand for pixels."""
        return sum(self.runs)

    @property
    def num_tokens(self) -> int:
        """Visual tokens and separators."""
        return self.num_visual_tokens + (len(self.runs) - 1 if self.separator else 0)

    @property
    def text(self) -> str:
        """The layout as it is written in a prompt."""
        return self.separator.join(IMAGE_CONTEXT * run for run in self.runs)

    def ids(self, visual: int, separator: int | None) -> list[int]:
        """The layout as ids (`num_tokens`,).

        Args:
            visual: Id of `<IMG_CONTEXT>`.
            separator: Id of the separator; None where there is none.
        """
        ids: list[int] = []
        for index, run in enumerate(self.runs):
            if index and separator is not None:
                ids.append(separator)
            ids += [visual] * run
        return ids


class Tiling(Protocol):
    """A way to cut images. Instances are made by name (`TILINGS`) with the settings of a processor.

    Attributes:
        image_size: Side of a tile, px.
        max_tiles: Most tiles of one image; what is added to them (a thumbnail) does not count.
    """

    @property
    def image_size(self) -> int: ...

    @property
    def max_tiles(self) -> int: ...

    def layout(self, width: int, height: int, tokens_per_side: int) -> TokenLayout:
        """The tokens of an image; needs no pixels.

        Args:
            width: Of the image, px.
            height: Of the image, px.
            tokens_per_side: Visual tokens along a side of a tile.
        """
        ...

    def cut(self, image: Image.Image) -> np.ndarray:
        """Tiles of an RGB image, uint8 (`layout.num_tiles`, S, S, 3)."""
        ...
