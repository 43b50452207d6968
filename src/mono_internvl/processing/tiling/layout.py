"""How an image is cut and how it stands in a prompt: what every tiling says about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mono_internvl.errors import PromptError
from mono_internvl.processing.prompts import IMAGE_CONTEXT

NEWLINE, SEPARATOR = -1, -2
"""In an order of features: the learned tokens of a model that has them (`ImageMarks`)."""


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of one image, between `<img>` and `</img>`. Whoever needs a count asks here.

    Attributes:
        num_tiles: Crops that the model reads, in the order of `Tiling.cut`.
        num_features: Visual tokens of all of them.
        order: What stands at each token of the image: a feature of the tiles, counted tile after
            tile, each of them once; or a learned token, `NEWLINE` or `SEPARATOR`. Empty if the
            features stand tile after tile, and nothing else.

    Raises:
        PromptError: `order` is no order of the features.
    """

    num_tiles: int
    num_features: int
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        features = [number for number in self.order if number not in (NEWLINE, SEPARATOR)]
        if self.order and sorted(features) != list(range(self.num_features)):
            raise PromptError(
                f"order of {len(self.order)} numbers; expected each of 0 to "
                f"{self.num_features - 1} once, for the visual tokens of the image"
            )

    @property
    def num_tokens(self) -> int:
        """Rows that the decoder reads: of features, and learned ones."""
        return len(self.order) or self.num_features

    @property
    def text(self) -> str:
        """The layout as it is written in a prompt."""
        return IMAGE_CONTEXT * self.num_tokens


def feature_order(layouts: Sequence[TokenLayout]) -> Tensor | None:
    """What stands at each visual token of several images.

    Returns:
        (visual tokens,) int64: index into the features of all tiles, image after image, or a
        learned token below 0; None where the features stand tile after tile.
    """
    if not any(layout.order for layout in layouts):
        return None
    orders, first = [], 0
    for layout in layouts:
        order = torch.tensor(layout.order or range(layout.num_features), dtype=torch.int64)
        orders.append(torch.where(order < 0, order, order + first))
        first += layout.num_features
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
