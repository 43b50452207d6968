"""Tiles of InternVL: the grid nearest to the image's shape, and the whole image as a thumbnail.

Source: dynamic preprocessing of OpenGVLab/Mono-InternVL at 5b17ab4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from mono_internvl.configuration.checks import check_flag, check_integer
from mono_internvl.configuration.options import MAX_TILE_PX, MAX_TILES
from mono_internvl.errors import ImageError
from mono_internvl.processing.image_files import MAX_PIXELS
from mono_internvl.processing.tiling.layout import TokenLayout


@lru_cache(maxsize=256)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All grids of `min_tiles` to `max_tiles` tiles, fewest tiles first.

    The order among grids of equally many tiles decides ties. In the released code it is the order
    in which CPython iterates over a set of pairs, so the same set is built here, pair by pair.

    Returns:
        Pairs (columns, rows).

    Source: dynamic preprocessing of the released code.
    """
    grids = set()
    for bound in range(min_tiles, max_tiles + 1):
        for columns in range(1, bound + 1):
            # A smaller bound has given the others already.
            least = 1 if bound in (min_tiles, columns) else bound
            for rows in range(least, min(bound, max_tiles // columns) + 1):
                if columns * rows >= min_tiles:
                    grids.add((columns, rows))
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def choose_grid(
    width: int, height: int, *, min_tiles: int, max_tiles: int, image_size: int
) -> tuple[int, int]:
    """The grid whose shape is nearest to the image's.

    Among equally near grids a larger one is taken if the image has more than half of its pixels.

    Args:
        width, height: Size of the image, px.
        min_tiles, max_tiles: Bounds of columns x rows; the thumbnail does not count.
        image_size: Side of a tile, px.

    Returns:
        (columns, rows); (1, 1) where no grid lies within the bounds.
    """
    aspect = width / height
    area = width * height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in candidate_grids(min_tiles, max_tiles):
        distance = abs(aspect - columns / rows)
        if distance < best_distance:
            best, best_distance = (columns, rows), distance
        elif distance == best_distance and area > 0.5 * image_size * image_size * columns * rows:
            best = (columns, rows)
    return best


@dataclass(frozen=True)
class InternVLTiling:
    """Tiles row by row, then a thumbnail where there are several.

    Attributes:
        image_size: Side of a tile, px.
        min_tiles: Fewest tiles of an image.
        max_tiles: Most; the thumbnail does not count.
        use_thumbnail: Whether an image of several tiles is followed by itself, scaled to one tile.
        pad2square: Whether an image that may become one tile only (`max_tiles=1`) is padded to a
            square with `fill` instead of being stretched. Grids of tiles are never padded.
        fill: Colour of the padding, (R, G, B) of 0 to 255.

    Raises:
        ConfigError: A value is out of range.
    """

    image_size: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    use_thumbnail: bool = True
    pad2square: bool = False
    fill: tuple[int, ...] = (0, 0, 0)

    def __post_init__(self) -> None:
        check_integer("image_size", self.image_size, most=MAX_TILE_PX)
        check_integer("min_tiles", self.min_tiles, most=MAX_TILES)
        check_integer("max_tiles", self.max_tiles, most=MAX_TILES)
        check_flag("use_thumbnail", self.use_thumbnail)
        check_flag("pad2square", self.pad2square)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of the tiles of an image of `width` x `height` px."""
        return choose_grid(
            width,
            height,
            min_tiles=self.min_tiles,
            max_tiles=self.max_tiles,
            image_size=self.image_size,
        )

    def layout(self, width: int, height: int, tokens_per_side: int) -> TokenLayout:
        """Tile after tile, nothing between them; see `Tiling`."""
        columns, rows = self.grid(width, height)
        tiles = columns * rows
        if self.use_thumbnail and tiles > 1:
            tiles += 1
        return TokenLayout(tiles, tiles * tokens_per_side**2)

    def cut(self, image: Image.Image) -> np.ndarray:
        """Tiles row by row, the thumbnail last; see `Tiling`."""
        side = self.image_size
        if self.pad2square and self.max_tiles == 1:
            image = _pad_to_square(image, self.fill)
        columns, rows = self.grid(*image.size)
        whole = image.resize((side * columns, side * rows), Image.Resampling.BICUBIC)
        pixels = np.asarray(whole).reshape(rows, side, columns, side, 3)
        tiles = pixels.swapaxes(1, 2).reshape(rows * columns, side, side, 3)
        if not self.use_thumbnail or rows * columns == 1:
            return tiles
        small = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
        return np.concatenate([tiles, small[None]])


def _pad_to_square(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    if image.width == image.height:
        return image
    if side * side > MAX_PIXELS:
        raise ImageError(
            f"image of {image.width}x{image.height} px: padded to a square it has {side * side} "
            f"pixels; at most {MAX_PIXELS} are made, scale it down first"
        )
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
