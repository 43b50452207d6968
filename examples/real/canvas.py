"""Pictures onto a canvas: on white and centred for a test, varied for training."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageEnhance

_OVERSAMPLING = 2
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Placed:
    """A picture on a canvas.

    Attributes:
        picture: With its transparency.
        x, y: Of its middle, from 0 (left, top) to 1.
        size: Of its longer side, 1 is the canvas.
    """

    picture: Image.Image
    x: float = 0.5
    y: float = 0.5
    size: float = 0.9


def compose(placed: list[Placed], px: int, ground: tuple[int, int, int] = WHITE) -> Image.Image:
    """A canvas of `px` by `px` with pictures on a ground.

    Args:
        placed: What lies where; one that would stick out is moved inside.
        px: Side.
        ground: Red, green, blue.
    """
    side = px * _OVERSAMPLING
    canvas = Image.new("RGBA", (side, side), (*ground, 255))
    for one in placed:
        picture = _trimmed(one.picture)
        ratio = side * one.size / max(picture.size)
        width, height = (max(1, round(length * ratio)) for length in picture.size)
        left, top = (
            min(max(0, round(side * middle - length / 2)), side - length)
            for middle, length in ((one.x, width), (one.y, height))
        )
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        canvas.alpha_composite(resized, (left, top))
    return canvas.convert("RGB").resize((px, px), Image.Resampling.BOX)


def varied(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Mirrored, turned, stretched and coloured a little differently.

    Args:
        picture: With its transparency.
        rng: Decides.
    """
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.rotate(rng.uniform(-20, 20), expand=True, resample=Image.Resampling.BILINEAR)
    wide = rng.uniform(0.8, 1.25)
    picture = picture.resize((max(1, round(picture.width * wide)), picture.height))
    alpha, colours = picture.getchannel("A"), picture.convert("RGB")
    saturation = 0.0 if rng.random() < 0.08 else rng.uniform(0.5, 1.5)
    colours = ImageEnhance.Color(colours).enhance(saturation)
    colours = ImageEnhance.Brightness(colours).enhance(rng.uniform(0.75, 1.25))
    colours = ImageEnhance.Contrast(colours).enhance(rng.uniform(0.75, 1.25))
    if rng.random() < 0.5:
        hue, *rest = colours.convert("HSV").split()
        turn = rng.randint(-12, 12)
        hue = hue.point([(value + turn) % 256 for value in range(256)])
        colours = Image.merge("HSV", (hue, *rest)).convert("RGB")
    colours.putalpha(alpha)
    return colours


def _trimmed(picture: Image.Image) -> Image.Image:
    box = picture.getchannel("A").getbbox()
    return picture.crop(box) if box else picture
