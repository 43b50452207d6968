"""Image -> RGB -> tiles and thumbnail -> `pixel_values`.

Shapes: N tiles of all images together, S side of a tile in px, C = 3 channels (R, G, B).

The arithmetic is Pillow's and numpy's; no other image package is used. Uint8 tiles and float
values equal those of the released code bit for bit.
"""

import base64
import binascii
import io
import logging
import struct
import urllib.parse
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from mono_internvl.errors import ConfigError, ImageError

logger = logging.getLogger(__name__)

ImageSource = str | Path | bytes | BinaryIO | Image.Image | np.ndarray
"""What `load_image` accepts: a path, encoded bytes, a data URI, base64, an open file, or pixels."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 100_000_000
"""Largest image that is decoded, px; beyond it a small file can exhaust the memory."""

_DECODING_ERRORS = (
    OSError,
    SyntaxError,  # Pillow: broken PNG chunk
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
    UnidentifiedImageError,
)
_SHORTEST_BASE64 = 64  # the smallest PNG takes 92 characters
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def _name_of(source: object) -> str:
    """A short name of a source for messages: never the data themselves."""
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    if isinstance(source, Image.Image):
        return f"<PIL image {source.mode} {source.width}x{source.height}>"
    if isinstance(source, np.ndarray):
        return f"<array {source.dtype} {source.shape}>"
    text = str(source)
    return text if len(text) <= 120 else text[:117] + "..."


def _read_data_uri(uri: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ImageError(f"image {_name_of(uri)}: a data URI needs a comma before its data")
    data = urllib.parse.unquote_to_bytes(payload)
    if not header.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise ImageError(f"image {_name_of(uri)}: not valid base64 ({error})") from error


def _read_base64(text: str) -> bytes | None:
    """The bytes of an image in base64, as hosts hand it over; None if the text is a path."""
    if len(text) < _SHORTEST_BASE64:
        return None
    try:
        data = base64.b64decode(text, validate=True)
        return None if Path(text).is_file() else data
    except ValueError:  # a path has characters that base64 has not, mostly a dot
        return None
    except OSError:  # too long for a path
        return data


def _from_array(pixels: np.ndarray) -> Image.Image:
    """The image of uint8 pixels, (height, width) grey or (height, width, 3 or 4)."""
    fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if pixels.dtype != np.uint8 or not fits or not pixels.size:
        raise ImageError(
            f"image array of {pixels.dtype} {pixels.shape}; expected uint8 (height, width, 3)"
        )
    return Image.fromarray(pixels)


def _open(source: object) -> Image.Image:
    """The image behind `source`, its header read, its pixels perhaps not yet."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str):
        scheme = source.split(":", 1)[0].lower() if ":" in source else ""
        if scheme in ("http", "https", "ftp", "s3", "gs", "file"):
            raise ImageError(
                f"image {_name_of(source)}: nothing is fetched; save it first and pass its path"
            )
        if scheme == "data":
            return _open(_read_data_uri(source))
        return _open(Path(source) if (data := _read_base64(source)) is None else data)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if hasattr(source, "read"):
        source = source.read()
    if isinstance(source, bytes):
        if not source:
            raise ImageError("image <0 bytes>: empty; expected an encoded image")
        return Image.open(io.BytesIO(source))
    if isinstance(source, Path):
        if not source.is_file():
            raise ImageError(f"image {_name_of(source)}: no such file")
        if source.stat().st_size == 0:
            raise ImageError(f"image {_name_of(source)}: the file is empty")
        return Image.open(io.BytesIO(source.read_bytes()))
    raise ImageError(
        f"image of type {type(source).__name__}; expected a path, bytes, an open file, a data URI, "
        "base64, a PIL image or an array"
    )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB; 16-bit grey is scaled, where Pillow's own conversion would clip it to white."""
    if image.mode == "RGB":
        return image
    if image.mode in _SIXTEEN_BIT_MODES:
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 0xFFFF):
            raise ImageError(
                f"image {name}: integer pixels from {values.min()} to {values.max()}; "
                "expected 0 to 65535, convert it to 8 or 16 bits first"
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(
            f"image {name}: floating-point pixels have no fixed range; convert it to 8 bits first"
        )
    return image.convert("RGB")


def load_image(source: ImageSource) -> Image.Image:
    """Decodes an image to 8-bit RGB, upright.

    EXIF orientation is applied; of an animation the first frame is taken; alpha is dropped without
    compositing, as the released code does. Grey of more than 8 bits (modes "I;16" and "I") is read
    as 0 to 65535, whatever its brightest pixel, and scaled; beyond that range it is refused.

    Args:
        source: Path, encoded bytes, open file, data URI, base64, PIL image, or array of uint8
            (height, width, 3). No URL is fetched.

    Returns:
        A PIL image of mode RGB.

    Raises:
        ImageError: If the source is no image, truncated, empty, has a side of zero, more than
            `MAX_PIXELS` pixels (checked before decoding), or is a URL.
    """
    name = _name_of(source)
    try:
        image = _open(source)
        _check_size(image, name)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), name)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"image {name}: {error}; at most {MAX_PIXELS} pixels are decoded"
        ) from error
    except _DECODING_ERRORS as error:
        raise ImageError(
            f"image {name}: cannot be decoded ({type(error).__name__}: {error}); "
            "check that the file is complete and a supported image format"
        ) from error


def _check_size(image: Image.Image, name: str) -> None:
    if image.width <= 0 or image.height <= 0:
        raise ImageError(f"image {name}: {image.width}x{image.height} px; expected at least 1x1")
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"image {name}: {image.width}x{image.height} = {image.width * image.height} pixels; "
            f"at most {MAX_PIXELS} are decoded, scale it down first"
        )


@lru_cache(maxsize=256)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All grids of `min_tiles` to `max_tiles` tiles, fewest tiles first.

    The order among grids of equally many tiles decides ties. In the released code it is the order
    in which CPython iterates over a set of pairs, so the same set is built here, pair by pair.

    Returns:
        Pairs (columns, rows).

    Source: dynamic preprocessing of the released code.
    """
    grids = {
        (columns, rows)
        for bound in range(min_tiles, max_tiles + 1)
        for columns in range(1, bound + 1)
        for rows in range(1, bound + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
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
        if image_size < 1:
            raise ConfigError(f"image_size={image_size}; expected a positive number of pixels")
        if not 1 <= min_tiles <= max_tiles:
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
        if most < 1:
            raise ConfigError(f"max_tiles={most}; expected at least 1")
        return choose_grid(
            width,
            height,
            min_tiles=self.min_tiles if min_tiles is None else min_tiles,
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
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def is_one_image(images: object) -> bool:
    """Whether this is an image, and no collection of images."""
    kinds = (str, Path, bytes, Image.Image, np.ndarray)
    return isinstance(images, kinds) or hasattr(images, "read")


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
