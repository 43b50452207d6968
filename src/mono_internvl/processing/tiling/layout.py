"""How an image is cut and how it stands in a prompt: what every tiling says about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mono_internvl.errors import PromptError
from mono_internvl.processing.prompts import IMAGE_CONTEXT


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of one image, between `<img>` and `</img>`. Whoever needs a count asks here.

    Attributes:
        num_tiles: Crops that the model reads, in the order of `Tiling.cut`.
        runs: Visual tokens that stand side by side: of a tile, or of a row of the whole image.
        ends: Token of the vocabulary behind each run, such as a newline; "" where the next one
            touches it. Empty if there is none at all.
        order: For each visual token the one of the tiles', counted tile after tile, that stands
            there: each of them once. Empty if they stand tile after tile.

    Raises:
        PromptError: `order` is no order of the visual tokens.
    """

    num_tiles: int
    runs: tuple[int, ...]
    ends: tuple[str, ...] = ()
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.order and sorted(self.order) != list(range(self.num_visual_tokens)):
            raise PromptError(
                f"order of {len(self.order)} numbers; expected each of 0 to "
                f"{self.num_visual_tokens - 1} once, for the visual tokens of the image"
            )

    @property
    def num_visual_tokens(self) -> int:
        """Tokens that stand for pixels."""
        return sum(self.runs)

    @property
    def num_tokens(self) -> int:
        """Visual tokens, and those behind the runs."""
        return self.num_visual_tokens + sum(end != "" for end in self.ends)

    @property
    def text(self) -> str:
        """The layout as it is written in a prompt."""
        return "".join(IMAGE_CONTEXT * run + end for run, end in self._parts())

    def ids(self, id_of: Callable[[str], int]) -> list[int]:
        """The layout as ids (`num_tokens`,).

        Args:
            id_of: From a token of the vocabulary to its id.
        """
        ids: list[int] = []
        for run, end in self._parts():
            ids += [id_of(IMAGE_CONTEXT)] * run
            ids += [id_of(end)] if end else []
        return ids

    def _parts(self) -> Iterator[tuple[int, str]]:
        return zip(self.runs, self.ends or ("",) * len(self.runs), strict=True)


def feature_order(layouts: Sequence[TokenLayout]) -> Tensor | None:
    """Which feature of the tiles stands at each visual token of several images.

    Returns:
        (visual tokens,) int64 index into the features of all tiles, image after image; None where
        they stand tile after tile.
    """
    if not any(layout.order for layout in layouts):
        return None
    orders, first = [], 0
    for layout in layouts:
        count = layout.num_visual_tokens
        orders.append(torch.tensor(layout.order or range(count), dtype=torch.int64) + first)
        first += count
    return torch.cat(orders)


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
