"""Tiles of InternLM-XComposer2-4KHD: an image of any shape from 336 px to 4K, in one canvas.

The image is enlarged or shrunk to as many tiles as the limit allows, its shape is kept, and what is
missing to whole tiles is padded with white. In front stands the whole canvas in one tile (the
global view). Tokens run across the canvas row by row, whatever tile they come from.

Legend: S side of a tile (px), s visual tokens along it, h and w tiles of a column and a row.

Source: arXiv 2404.06512 and its published code (InternLM/InternLM-XComposer at 0f70c3e): the size,
the padding, the reflection of tall images, the order global view, separator, tiles, and a newline
behind each row of tokens; (h w + 1) s^2 + 1 + (h + 1) s tokens.
Differs: an image thinner than a pixel after scaling keeps one, where the published code fails; the
global view is scaled with antialiasing; normalisation is the model's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from mono_internvl.configuration.checks import check_integer
from mono_internvl.configuration.options import MAX_TILE_PX, MAX_TILES
from mono_internvl.errors import ConfigError
from mono_internvl.processing.tiling.layout import NEWLINE, SEPARATOR, TokenLayout

_WHITE = (255, 255, 255)


@dataclass(frozen=True)
class XComposer4KHDTiling:
    """Global view, then a canvas of tiles row by row.

    Attributes:
        image_size: Side of a tile, px; 336 as published.
        max_tiles: The HD limit: most tiles of the canvas. Published are 16, 25, 45, 55 and 65.
        min_tiles, use_thumbnail, pad2square: Have one value each: 1, True, False.
        fill: Not used; padding is white.

    Raises:
        ConfigError: A value is out of range.
    """

    image_size: int = 336
    min_tiles: int = 1
    max_tiles: int = 25
    use_thumbnail: bool = True
    pad2square: bool = False
    fill: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_integer("image_size", self.image_size, most=MAX_TILE_PX)
        check_integer("max_tiles", self.max_tiles, most=MAX_TILES)
        for name, value in (("min_tiles", 1), ("use_thumbnail", True), ("pad2square", False)):
            if getattr(self, name) != value:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} with tiling='xcomposer_4khd'; expected "
                    f"{value!r}: its grid fills max_tiles, and the global view is always there"
                )

    def scaled(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of an image that is not taller than wide, on its canvas, px."""
        ratio = width / height
        columns = 1
        while (columns + 1) * math.ceil((columns + 1) / ratio) <= self.max_tiles:
            columns += 1
        width = columns * self.image_size
        return width, max(1, int(width / ratio))

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of the tiles of an image of `width` x `height` px."""
        if width < height:
            rows, columns = self.grid(height, width)
            return columns, rows
        wide, high = self.scaled(width, height)
        return wide // self.image_size, math.ceil(high / self.image_size)

    def layout(self, width: int, height: int, tokens_per_side: int) -> TokenLayout:
        """Rows of the global view, a separator, rows of the canvas; see `Tiling`."""
        return _layout(*self.grid(width, height), tokens_per_side)

    def cut(self, image: Image.Image) -> np.ndarray:
        """The global view, then tiles row by row; see `Tiling`."""
        side, is_tall = self.image_size, image.width < image.height
        if is_tall:
            image = image.transpose(Image.Transpose.TRANSPOSE)
        wide, high = self.scaled(*image.size)
        rows = math.ceil(high / side)
        canvas = Image.new("RGB", (wide, rows * side), _WHITE)
        scaled = image.resize((wide, high), Image.Resampling.BILINEAR)
        canvas.paste(scaled, (0, (rows * side - high) // 2))
        if is_tall:
            canvas = canvas.transpose(Image.Transpose.TRANSPOSE)
        columns, rows = canvas.width // side, canvas.height // side
        whole = np.asarray(canvas.resize((side, side), Image.Resampling.BICUBIC))
        pixels = np.asarray(canvas).reshape(rows, side, columns, side, 3)
        tiles = pixels.swapaxes(1, 2).reshape(rows * columns, side, side, 3)
        return np.concatenate([whole[None], tiles])


@lru_cache(maxsize=256)
def _layout(columns: int, rows: int, s: int) -> TokenLayout:
    def with_newlines(tokens: np.ndarray) -> list[int]:
        return np.pad(tokens, ((0, 0), (0, 1)), constant_values=NEWLINE).flatten().tolist()  # type: ignore[no-any-return]

    count = (columns * rows + 1) * s * s
    tokens = np.arange(count).reshape(-1, s, s)  # by tile
    canvas = tokens[1:].reshape(rows, columns, s, s).swapaxes(1, 2)
    across = canvas.reshape(rows * s, columns * s)
    order = (*with_newlines(tokens[0]), SEPARATOR, *with_newlines(across))
    return TokenLayout(columns * rows + 1, count, order)
