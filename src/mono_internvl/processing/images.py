"""Image -> RGB -> tiles and thumbnail -> `pixel_values`.

Shapes: N tiles of all images together, S side of a tile in px, C = 3 channels (R, G, B).

The arithmetic is Pillow's and numpy's; no other image package is used. Uint8 tiles and float
values equal those of the released code bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from mono_internvl.configuration.checks import check_choice, check_integer
from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.errors import ConfigError, ImageError
from mono_internvl.processing.fast_decoding import Decoding, load_fast, normalize_fast
from mono_internvl.processing.image_files import load_image
from mono_internvl.processing.tiling import TILINGS, Tiling, TokenLayout, feature_order

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

VISUAL_TOKEN_SIZE = 28
"""Side of the square that one visual token sees, px: 2x2 patches of 14 px."""


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
    crop_to_patches: bool


class MonoInternVLImageProcessor(BaseImageProcessor):
    """Cuts images into tiles and normalises them.

    Args:
        image_size: Side of a tile, px.
        min_tiles, max_tiles: Bounds of the number of tiles of one image, the thumbnail not counted.
        use_thumbnail: Whether an image of several tiles is followed by itself, scaled to one tile.
        image_mean, image_std: Normalisation of (R, G, B) in [0, 1].
        pad2square: Whether an image that becomes one tile (`max_tiles=1`) is padded to a square
            with the mean colour instead of being stretched. Grids of tiles are never padded.
        tiling: How images are cut, a name of `TILINGS`.
        visual_token_size: Side of the square that one visual token sees, px.

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
        tiling: str = "internvl",
        visual_token_size: int = VISUAL_TOKEN_SIZE,
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
        self.tiling = tiling
        self.visual_token_size = visual_token_size
        self.decoding: Decoding = "exact"  # of this run, never saved
        check_choice("tiling", tiling, tuple(TILINGS))
        check_integer("visual_token_size", visual_token_size)
        self.tiling_with()  # holds the settings against their bounds
        if min_tiles > max_tiles:
            raise ConfigError(
                f"min_tiles={min_tiles}, max_tiles={max_tiles}; expected 1 <= min <= max"
            )
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ConfigError(
                f"image_mean={image_mean}, image_std={image_std}; expected three values, std > 0"
            )

    @classmethod
    def from_config(cls, config: MonoInternVLConfig) -> "MonoInternVLImageProcessor":
        """The settings of a model."""
        tiled, vision = config.dynamic_image_size, config.vision_config
        return cls(
            image_size=config.force_image_size,
            min_tiles=config.min_dynamic_patch if tiled else 1,
            max_tiles=config.max_dynamic_patch if tiled else 1,
            use_thumbnail=config.use_thumbnail and tiled,
            pad2square=config.pad2square,
            tiling=config.tiling,
            visual_token_size=round(vision.patch_size / config.downsample_ratio),
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings that belong to a checkpoint; how files are decoded is a run's own choice."""
        return {name: value for name, value in super().to_dict().items() if name != "decoding"}

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

    def tiling_with(
        self,
        *,
        min_tiles: int | None = None,
        max_tiles: int | None = None,
        use_thumbnail: bool | None = None,
        pad2square: bool | None = None,
    ) -> Tiling:
        """How images are cut: with the processor's own settings where none is given."""

        def own(value: Any, name: str) -> Any:
            return getattr(self, name) if value is None else value

        return TILINGS[self.tiling](
            image_size=self.image_size,
            min_tiles=own(min_tiles, "min_tiles"),
            max_tiles=own(max_tiles, "max_tiles"),
            use_thumbnail=own(use_thumbnail, "use_thumbnail"),
            pad2square=own(pad2square, "pad2square"),
            fill=tuple(int(value * 255) for value in self.image_mean),
        )

    def layout_of(self, width: int, height: int, **settings: Any) -> TokenLayout:
        """The tokens of an image of `width` x `height` px; needs no pixels.

        Args:
            width: Of the image.
            height: Of the image.
            **settings: As `tiling_with` takes them.
        """
        side = self.image_size // self.visual_token_size
        return self.tiling_with(**settings).layout(width, height, side)

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
        crop_to_patches: bool = True,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tiles of one image, of a list, or of a list of lists of images, all in one tensor.

        Args:
            images: An `ImageSource` or nested lists of them.
            image_size, min_tiles, use_thumbnail, pad2square: Override the processor's own.
            max_tiles: Overrides the processor's own; one number, or one for each image in order.
            crop_to_patches: Whether images are cut at all; without, each is one tile. Trainers ask
                for it by this name of transformers' own InternVL.
            return_tensors: `"np"` for numpy arrays; torch tensors otherwise.

        Returns:
            `pixel_values`, float32 (N, 3, S, S), tiles of all images in order; `num_tiles`, for
            each image its tiles with the thumbnail: a list, or int64 if `return_tensors` is given,
            also under transformers' name, `num_patches`;
            `layouts`, for each image its `TokenLayout`, and what `feature_order` makes of them.

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
        if not crop_to_patches:
            min_tiles = max_tiles = 1
        limits = _one_limit_per_image(max_tiles, len(flat))
        settings: dict[str, Any] = {
            "min_tiles": min_tiles,
            "use_thumbnail": use_thumbnail,
            "pad2square": pad2square,
        }
        tiles, layouts = [], []
        pads = self.pad2square if pad2square is None else pad2square
        load = load_fast if self.decoding == "fast" and not pads else load_image
        for source, limit in zip(flat, limits, strict=True):
            image = load(source)
            tiles.append(self.tiling_with(**settings, max_tiles=limit).cut(image))
            layouts.append(self.layout_of(*image.size, **settings, max_tiles=limit))
        whole = np.concatenate(tiles) if len(tiles) > 1 else tiles[0]
        if self.decoding == "fast":
            pixels = normalize_fast(whole, self.image_mean, self.image_std)
        else:
            pixels = self.normalize_tiles(whole)
        counts = [layout.num_tiles for layout in layouts]
        data: dict[str, Any]
        if return_tensors == "np":
            data = {"pixel_values": pixels, "num_tiles": np.array(counts)}
        else:
            num_tiles = counts if return_tensors is None else torch.tensor(counts)
            data = {"pixel_values": torch.from_numpy(pixels), "num_tiles": num_tiles}
        data["num_patches"] = data["num_tiles"]
        if (order := feature_order(layouts)) is not None:
            data["feature_order"] = order.numpy() if return_tensors == "np" else order
        return BatchFeature({**data, "layouts": layouts})


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
