"""JPEG files decoded by libjpeg-turbo alone, and scaled by PyTorch's antialiased bicubic filter.

A named choice: pixels may differ from the exact way's by a grey level or two. Whatever is not an
8-bit JPEG in colour or grey takes the exact way, scaling included.

Source: measured beside Pillow, `mono-internvl bench images`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from mono_internvl.errors import MissingDependency
from mono_internvl.processing.image_files import ImageSource, jpeg_bytes, load_image

Decoding = Literal["exact", "fast"]
"""How image files become tiles: as the released code does it, or this file's way."""


@dataclass(frozen=True)
class FastImage:
    """Decoded pixels that scale as `PIL.Image.Image.resize` does, and faster.

    Attributes:
        pixels: (height, width, 3) uint8.
    """

    pixels: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), px."""
        height, width = self.pixels.shape[:2]
        return width, height

    def resize(self, size: tuple[int, int], resample: Any = None) -> np.ndarray:
        """(height, width, 3) uint8 of another size; bicubic, antialiased.

        Args:
            size: (width, height), px.
            resample: Of no meaning: there is one filter.
        """
        if size == self.size:
            return self.pixels
        # Channels last by its strides of all four dimensions: so is what comes out, and twice as
        # fast, and tiles are cut of it without being reordered.
        x = torch.from_numpy(self.pixels)[None].permute(0, 3, 1, 2)  # (1, 3, H, W)
        scaled = F.interpolate(x, (size[1], size[0]), mode="bicubic", antialias=True)
        return scaled[0].permute(1, 2, 0).numpy()


def normalize_fast(tiles: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalises uint8 tiles (N, S, S, 3) by one product and one sum; equal but for rounding.

    Args:
        tiles: As a tiling cuts them.
        mean, std: Of (R, G, B) in [0, 1].

    Returns:
        float32 (N, 3, S, S).
    """
    x = torch.from_numpy(np.ascontiguousarray(tiles)).permute(0, 3, 1, 2)
    means, stds = (torch.tensor(values)[:, None, None] for values in (mean, std))
    out = torch.empty(x.shape, dtype=torch.float32).copy_(x)
    return out.mul_(1 / (255 * stds)).sub_(means / stds).numpy()


def load_fast(source: ImageSource) -> Any:
    """An image decoded the fast way where it is a JPEG, else by `load_image`.

    Raises:
        ImageError: As by `load_image`.
        MissingDependency: simplejpeg is not installed.
    """
    try:
        import simplejpeg
    except ImportError as error:
        raise MissingDependency(
            "decoding='fast' needs simplejpeg; pip install 'mono-internvl[data]', or take "
            "decoding='exact'"
        ) from error
    data = jpeg_bytes(source)
    if data is None:
        return load_image(source)
    try:
        return FastImage(simplejpeg.decode_jpeg(data, colorspace="RGB"))
    except ValueError:  # damaged, or of a kind that Pillow may know; it also says what is wrong
        return load_image(data)
