"""Image -> RGB -> tiles and thumbnail -> `pixel_values`.

Shapes: N tiles of all images together, S side of a tile in px, C = 3 channels (R, G, B).

The arithmetic is Pillow's and numpy's; no other image package is used. Uint8 tiles and float
values equal those of the released code bit for bit.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from mono_internvl.configuration.checks import check_flag, check_integer
from mono_internvl.configuration.options import MAX_TILE_PX, MAX_TILES
from mono_internvl.errors import ConfigError, ImageError
from mono_internvl.processing.image_files import MAX_PIXELS, load_image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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


def share_tiles(max_tiles: int, num_images: int) -> int:
    """Largest number of tiles per image where several images of a sample share one budget.

    Returns:
        `max_tiles // num_images`, at least 1.
    """
    return max(1, max_tiles // max(1, num_images))


class MonoInternVLImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Options of one call of the image processor."""

    image_size: int
    min_tiles: int
    max_tiles: int | list[int]
    use_thumbnail: bool
    pad2square: bool


class MonoInternVLImageProcessor(BaseImageProcessor):
    """Cuts images into tiles and normalises them.

    Args:
        image_size: Side of a tile, px.
        min_tiles, max_tiles: Bounds of the number of tiles of one image, the thumbnail not counted.
        use_thumbnail: Whether an image of several tiles is followed by itself, scaled to one tile.
        image_mean, image_std: Normalisation of (R, G, B) in [0, 1].
        pad2square: Whether an image that becomes one tile (`max_tiles=1`) is padded to a square
            with the mean colour instead of being stretched. Grids of tiles are never padded.

    Raises:
        ConfigError: If a value is out of range.
    """

    model_input_names = ["pixel_values", "num_tiles"]  # noqa: RUF012 - as the base class
    valid_kwargs = MonoInternVLImagesKwargs

    def __init__(
        self,
        image_size: int = 448,
        min_tiles: int = 1,
        max_tiles: int = 12,
        use_thumbnail: bool = True,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        pad2square: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.min_tiles = min_tiles
        self.max_tiles = max_tiles
        self.use_thumbnail = use_thumbnail
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.pad2square = pad2square
        check_integer("image_size", image_size, most=MAX_TILE_PX)
        check_integer("min_tiles", min_tiles, most=MAX_TILES)
        check_integer("max_tiles", max_tiles, most=MAX_TILES)
        check_flag("use_thumbnail", use_thumbnail)
        check_flag("pad2square", pad2square)
        if min_tiles > max_tiles:
            raise ConfigError(
                f"min_tiles={min_tiles}, max_tiles={max_tiles}; expected 1 <= min <= max"
            )
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ConfigError(
                f"image_mean={image_mean}, image_std={image_std}; expected three values, std > 0"
            )

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Decodes images in any nesting of lists; unlike the base class it never fetches a URL.

        Args:
            image_url_or_urls: An `ImageSource` or nested lists of them.

        Returns:
            PIL images of mode RGB in the same nesting.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        return load_image(image_url_or_urls)

    def grid_for(
        self, width: int, height: int, *, min_tiles: int | None = None, max_tiles: int | None = None
    ) -> tuple[int, int]:
        """(columns, rows) of the tiles of an image of `width` x `height` px."""
        most = self.max_tiles if max_tiles is None else max_tiles
        least = self.min_tiles if min_tiles is None else min_tiles
        check_integer("max_tiles", most, most=MAX_TILES)
        check_integer("min_tiles", least, most=MAX_TILES)
        return choose_grid(
            width,
            height,
            min_tiles=least,
            max_tiles=most,
            image_size=self.image_size,
        )

    def num_tiles_for(
        self,
        width: int,
        height: int,
        *,
        min_tiles: int | None = None,
        max_tiles: int | None = None,
        use_thumbnail: bool | None = None,
    ) -> int:
        """Tiles of an image of `width` x `height` px, its thumbnail counted; needs no pixels."""
        columns, rows = self.grid_for(width, height, min_tiles=min_tiles, max_tiles=max_tiles)
        thumbnail = self.use_thumbnail if use_thumbnail is None else use_thumbnail
        return columns * rows + int(thumbnail and columns * rows > 1)

    def cut_tiles(
        self,
        image: Image.Image,
        *,
        min_tiles: int | None = None,
        max_tiles: int | None = None,
        use_thumbnail: bool | None = None,
        pad2square: bool | None = None,
    ) -> np.ndarray:
        """Tiles of one RGB image, row by row, the thumbnail last.

        Returns:
            uint8 array (tiles, S, S, 3).
        """
        side = self.image_size
        most = self.max_tiles if max_tiles is None else max_tiles
        if (self.pad2square if pad2square is None else pad2square) and most == 1:
            image = _pad_to_square(image, self.image_mean)
        columns, rows = self.grid_for(*image.size, min_tiles=min_tiles, max_tiles=most)
        whole = image.resize((side * columns, side * rows), Image.Resampling.BICUBIC)
        pixels = np.asarray(whole).reshape(rows, side, columns, side, 3)
        tiles = pixels.swapaxes(1, 2).reshape(rows * columns, side, side, 3)
        thumbnail = self.use_thumbnail if use_thumbnail is None else use_thumbnail
        if not thumbnail or rows * columns == 1:
            return tiles
        small = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
        return np.concatenate([tiles, small[None]])

    def normalize_tiles(self, tiles: np.ndarray) -> np.ndarray:
        """Normalises uint8 tiles (N, S, S, 3).

        A table of the 256 possible values per channel gives the same bits as computing
        `(x / 255 - mean) / std` for every pixel, in a fraction of the time.

        Returns:
            float32 array (N, 3, S, S).
        """
        table = np.arange(256, dtype=np.float32)[None] / np.float32(255)
        table = table - np.array(self.image_mean, dtype=np.float32)[:, None]
        table = table / np.array(self.image_std, dtype=np.float32)[:, None]  # (3, 256)
        out = np.empty((tiles.shape[0], 3, *tiles.shape[1:3]), dtype=np.float32)
        for channel in range(3):
            out[:, channel] = table[channel][tiles[..., channel]]
        return out

    def preprocess(
        self,
        images: Any,
        *,
        image_size: int | None = None,
        min_tiles: int | None = None,
        max_tiles: int | Sequence[int] | None = None,
        use_thumbnail: bool | None = None,
        pad2square: bool | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tiles of one image, of a list, or of a list of lists of images, all in one tensor.

        A video is a list of its frames with `max_tiles=1`.

        Args:
            images: An `ImageSource` or nested lists of them.
            image_size, min_tiles, use_thumbnail, pad2square: Override the processor's own.
            max_tiles: Overrides the processor's own; one number, or one for each image in order.
            return_tensors: `"np"` for numpy arrays; torch tensors otherwise.

        Returns:
            `pixel_values`, float32 (N, 3, S, S), tiles of all images in order; `num_tiles`, for
            each image its tiles with the thumbnail: a list, or int64 if `return_tensors` is given.

        Raises:
            ImageError: If an image cannot be decoded, or there is none.
            ConfigError: If `max_tiles` has not one value for each image.
        """
        unknown = sorted(set(kwargs) - set(ImagesKwargs.__annotations__))
        if unknown:
            raise TypeError(f"unknown options {', '.join(unknown)} of the image processor")
        if image_size is not None and image_size != self.image_size:
            raise ConfigError(
                f"image_size={image_size}, but this processor cuts {self.image_size} px; "
                "make a processor with that size"
            )
        flat = _flatten(images)
        if not flat:
            raise ImageError("images: empty list; expected at least one image")
        limits = _one_limit_per_image(max_tiles, len(flat))
        tiles = [
            self.cut_tiles(
                load_image(image),
                min_tiles=min_tiles,
                max_tiles=limit,
                use_thumbnail=use_thumbnail,
                pad2square=pad2square,
            )
            for image, limit in zip(flat, limits, strict=True)
        ]
        counts = [len(one) for one in tiles]
        pixels = self.normalize_tiles(np.concatenate(tiles) if len(tiles) > 1 else tiles[0])
        if return_tensors == "np":
            return BatchFeature({"pixel_values": pixels, "num_tiles": np.array(counts)})
        num_tiles = counts if return_tensors is None else torch.tensor(counts)
        return BatchFeature({"pixel_values": torch.from_numpy(pixels), "num_tiles": num_tiles})


def _pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    side = max(image.size)
    if image.width == image.height:
        return image
    if side * side > MAX_PIXELS:
        raise ImageError(
            f"image of {image.width}x{image.height} px: padded to a square it has {side * side} "
            f"pixels; at most {MAX_PIXELS} are made, scale it down first"
        )
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _flatten(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in _flatten(item)]
    return [images]


def _one_limit_per_image(
    max_tiles: int | Sequence[int] | None, num_images: int
) -> list[int] | list[None]:
    if max_tiles is None:
        return [None] * num_images
    if isinstance(max_tiles, int):
        return [max_tiles] * num_images
    if len(max_tiles) != num_images:
        raise ConfigError(
            f"max_tiles has {len(max_tiles)} values for {num_images} images; "
            "give one number or one each"
        )
    return list(max_tiles)
