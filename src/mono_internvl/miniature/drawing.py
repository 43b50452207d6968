"""Draws scenes, signs and charts: pictures of 168 x 168 px, that is 6 x 6 visual tokens of 28 px.

A person can answer every question from the picture. Things are jittered off the token grid unless
`is_aligned`; colours and backgrounds vary a little. Boxes are measured on the drawn pixels.
"""

from __future__ import annotations

import colorsys
import math
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, TypeAlias

from PIL import Image, ImageDraw, ImageFont

from mono_internvl.miniature.lexicon import POSITIONS
from mono_internvl.miniature.scenes import Chart, Scene

IMAGE_SIZE_PX: Final = 168
TOKEN_PX: Final = 28
CELL_PX: Final = 56
"""A third of the picture: one of the nine positions, two by two visual tokens."""

Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right, bottom in thousandths of the picture's width and height."""

_RGB: Final = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 90, 220),
    "yellow": (235, 205, 30),
    "purple": (140, 50, 175),
    "orange": (245, 135, 25),
}
_MIN_HUE_DISTANCE = 0.078  # of the circle, 28 degrees: as near as the nearest two, red and orange
_GREY_SATURATION = 0.2
_COLOUR_JITTER = 14  # of 255, for each channel; the six colours stay far apart
_DIAMETERS_PX = {"large": (48, 50, 52), "small": (32, 34, 36)}
_MAX_OBJECT_JITTER_PX = 8
_SIGN_JITTER_PX = 6
_CHART_JITTER_PX = 3
_SUPERSAMPLING = 4
_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold")
_SIGN_FONT_PX = (32, 34, 36)
_VALUE_FONT_PX = 24
_VALUE_GAP_PX = 4
_MAX_GLYPH_WIDTH_PX = 26
_SIGN_BASELINE_PX = 26  # below the top of the row
_BASELINE_PX = 140
_BAR_STEP_PX = 14
_BAR_WIDTH_PX = 20


@dataclass(frozen=True)
class Drawing:
    """A picture and where its things are.

    Attributes:
        image: RGB, 168 x 168 px.
        boxes: one for each object of a scene, bar of a chart or word of a sign, in order.
    """

    image: Image.Image
    boxes: tuple[Box, ...]


def draw_scene(scene: Scene, rng: random.Random, is_aligned: bool = False) -> Drawing:
    """Draw the objects of a scene, each inside its cell.

    Args:
        scene: what to draw.
        rng: source of the jitter and of the shades.
        is_aligned: put every object in the middle of its cell, on a corner of the token grid.

    Returns:
        The drawing, one box for each object.
    """
    image = background(rng)
    boxes = []
    for thing in scene.objects:
        diameter = rng.choice(_DIAMETERS_PX[thing.size])
        reach = 0 if is_aligned else min((CELL_PX - diameter) // 2, _MAX_OBJECT_JITTER_PX)
        row, column = divmod(POSITIONS.index(thing.position), 3)
        margin = (CELL_PX - diameter) // 2
        left = column * CELL_PX + margin + rng.randint(-reach, reach)
        top = row * CELL_PX + margin + rng.randint(-reach, reach)
        mask = _shape_mask(thing.shape, diameter)
        ink = _shade(rng, _RGB[thing.colour]) if thing.colour else unnamed_colour(rng)
        image.paste(ink, (left, top), mask)
        boxes.append(_box_of(mask, left, top))
    return Drawing(image, tuple(boxes))


def draw_sign(text: str, rng: random.Random, is_aligned: bool = False) -> Drawing:
    """Write words and numbers from the top left, each in a row of its own, as a page is written.

    Every character has 28 px, so that one visual token sees about one character.

    Args:
        text: one to five words of at most five capitals or digits.
        rng: source of font, size, place, jitter and ink.
        is_aligned: every character in the middle of its visual token.

    Returns:
        The drawing, with one box for each word.
    """
    image = background(rng)
    font, size_px = rng.choice(_FONTS), rng.choice(_SIGN_FONT_PX)
    ink = (rng.randrange(90), rng.randrange(90), rng.randrange(90))
    reach = 0 if is_aligned else _SIGN_JITTER_PX
    shift_x, shift_y = rng.randint(0, reach), rng.randint(0, reach)
    boxes = []
    for row, word in enumerate(text.split()):
        left, top = shift_x, row * TOKEN_PX + shift_y
        edges: list[tuple[int, int, int, int]] = []
        for index, character in enumerate(word):
            glyph, rise = _glyph(font, size_px, character)
            x = left + index * TOKEN_PX + (TOKEN_PX - glyph.width) // 2
            y = top + _SIGN_BASELINE_PX - rise
            image.paste(ink, (x, y), glyph)
            edges.append((x, y, x + glyph.width, y + glyph.height))
        lefts, tops, rights, bottoms = zip(*edges, strict=True)
        boxes.append(_to_thousandths((min(lefts), min(tops), max(rights), max(bottoms))))
    return Drawing(image, tuple(boxes))


def draw_word(word: str, size_px: tuple[int, int], rng: random.Random) -> Image.Image:
    """A word of a sign's size, anywhere on a picture of any size.

    Args:
        word: Capitals or digits.
        size_px: Width and height of the picture.
        rng: Source of font, place and ink.
    """
    image = background(rng).resize(size_px)
    font, height = rng.choice(_FONTS), rng.choice(_SIGN_FONT_PX)
    ink = (rng.randrange(90), rng.randrange(90), rng.randrange(90))
    left = rng.randrange(size_px[0] - len(word) * TOKEN_PX)
    top = rng.randrange(size_px[1] - 2 * TOKEN_PX)
    for index, character in enumerate(word):
        glyph, rise = _glyph(font, height, character)
        x = left + index * TOKEN_PX + (TOKEN_PX - glyph.width) // 2
        image.paste(ink, (x, top + _SIGN_BASELINE_PX - rise), glyph)
    return image


def draw_chart(chart: Chart, rng: random.Random, is_aligned: bool = False) -> Drawing:
    """Draw a bar chart, the value of each bar written below it in its colour.

    Two units of value are one visual token high; bars of three stand apart, of four side by side.

    Args:
        chart: the bars.
        rng: source of the jitter and of the shades.
        is_aligned: no jitter.

    Returns:
        The drawing, one box for each bar.
    """
    image = background(rng)
    draw = ImageDraw.Draw(image)
    reach = 0 if is_aligned else _CHART_JITTER_PX
    shift_x, shift_y = rng.randint(-reach, reach), rng.randint(-reach, reach)
    font = rng.choice(_FONTS)
    step = 2 if len(chart.bars) < 4 else 1
    span = (len(chart.bars) - 1) * step + 1
    first = (IMAGE_SIZE_PX // TOKEN_PX - span) // 2
    base = _BASELINE_PX + shift_y
    draw.rectangle((4, base, IMAGE_SIZE_PX - 5, base + 1), fill=(70, 70, 70))
    boxes = []
    for index, (colour, value) in enumerate(chart.bars):
        centre = (first + index * step) * TOKEN_PX + TOKEN_PX // 2 + shift_x
        left, top = centre - _BAR_WIDTH_PX // 2, base - value * _BAR_STEP_PX
        right = left + _BAR_WIDTH_PX
        shade = _shade(rng, _RGB[colour])
        draw.rectangle((left, top, right - 1, base - 1), fill=shade)
        glyph, _ = _glyph(font, _VALUE_FONT_PX, str(value))
        image.paste(shade, (centre - glyph.width // 2, base + _VALUE_GAP_PX), glyph)
        boxes.append(_to_thousandths((left, top, right, base)))
    return Drawing(image, tuple(boxes))


def background(rng: random.Random) -> Image.Image:
    """An empty picture of a light shade."""
    grey = rng.randint(222, 250)
    tint = (grey + rng.randint(-6, 5), grey + rng.randint(-6, 5), grey + rng.randint(-6, 5))
    return Image.new("RGB", (IMAGE_SIZE_PX, IMAGE_SIZE_PX), tint)


def paste_thing(
    image: Image.Image, thing: tuple[str, str], diameter_px: int, corner: tuple[int, int]
) -> None:
    """Draw a thing of a colour and a shape, its upper left corner at a place in px."""
    colour, shape = thing
    image.paste(_RGB[colour], corner, _shape_mask(shape, diameter_px))


def _shade(rng: random.Random, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (
        min(255, max(0, value + rng.randint(-_COLOUR_JITTER, _COLOUR_JITTER))) for value in rgb
    )
    return red, green, blue


def unnamed_colour(rng: random.Random) -> tuple[int, int, int]:
    """Draw a colour that no word of the world means: a grey, or a hue far from all that have one.

    Args:
        rng: source of chance.

    Returns:
        RGB, each 0 to 255.
    """
    named = [hue_of(rgb) for rgb in _RGB.values()]
    while True:
        hue, saturation, value = rng.random(), rng.random(), rng.uniform(0.2, 0.85)
        is_far = all(hue_distance(hue, other) >= _MIN_HUE_DISTANCE for other in named)
        if is_far or saturation < _GREY_SATURATION:
            red, green, blue = (round(255 * x) for x in colorsys.hsv_to_rgb(hue, saturation, value))
            return red, green, blue


def hue_of(rgb: tuple[int, int, int]) -> float:
    """Return the hue of a colour (RGB, each 0 to 255) as a part of the circle, 0 to 1."""
    return colorsys.rgb_to_hsv(*(x / 255 for x in rgb))[0]


def hue_distance(one: float, other: float) -> float:
    """Return how far two hues lie apart on their circle, 0 to 0.5."""
    return min((one - other) % 1, (other - one) % 1)


def _box_of(mask: Image.Image, left: int, top: int) -> Box:
    x1, y1, x2, y2 = mask.getbbox() or (0, 0, *mask.size)
    return _to_thousandths((left + x1, top + y1, left + x2, top + y2))


def _to_thousandths(edges_px: tuple[int, int, int, int]) -> Box:
    x1, y1, x2, y2 = (round(edge * 1000 / IMAGE_SIZE_PX) for edge in edges_px)
    return x1, y1, x2, y2


@cache
def _shape_mask(shape: str, diameter_px: int) -> Image.Image:
    """Return the antialiased mask of a shape, `diameter_px` wide and high."""
    side = diameter_px * _SUPERSAMPLING
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
    elif shape == "square":
        draw.rectangle((0, 0, side - 1, side - 1), fill=255)
    elif shape == "triangle":
        draw.polygon([(side / 2, 0), (side - 1, side * 0.93), (0, side * 0.93)], fill=255)
    elif shape == "star":
        draw.polygon(_star_points(side), fill=255)
    elif shape == "cross":
        far, width = side - 1, side * 0.22
        upper, lower = [(far - width, 0), (far, 0), (far, width)], [(width, far), (0, far)]
        rising = [*upper, *lower, (0, far - width)]
        draw.polygon(rising, fill=255)
        draw.polygon([(far - x, y) for x, y in rising], fill=255)
    elif shape == "heart":
        half = side * 0.53
        draw.ellipse((0, 0, half, half), fill=255)
        draw.ellipse((side - half, 0, side, half), fill=255)
        draw.polygon(
            [(side * 0.04, half * 0.78), (side * 0.96, half * 0.78), (side / 2, side)], 255
        )
    elif shape == "moon":
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
        draw.ellipse((side * 0.38, -side * 0.08, side * 1.3, side * 0.84), fill=0)
    else:
        raise ValueError(f"shape: got {shape!r}, expected one that can be drawn")
    return mask.reduce(_SUPERSAMPLING)


def _star_points(side: int) -> list[tuple[float, float]]:
    """Return the ten corners of a five-pointed star in a square."""
    points = []
    for corner in range(10):
        radius = side * (0.52 if corner % 2 == 0 else 0.22)
        angle = math.pi * (corner / 5 - 0.5)
        points.append((side / 2 + radius * math.cos(angle), side * 0.53 + radius * math.sin(angle)))
    return points


@cache
def _font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    """Load one of the fonts that come with matplotlib."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size_px)


@cache
def _glyph(font_name: str, size_px: int, character: str) -> tuple[Image.Image, int]:
    """Return a character's mask, cut to its ink, and how far it rises above the baseline in px.

    Letters wider than a visual token are narrowed to fit into it.
    """
    canvas = Image.new("L", (3 * size_px, 3 * size_px), 0)
    baseline = 2 * size_px
    ImageDraw.Draw(canvas).text(
        (size_px, baseline), character, fill=255, font=_font(font_name, size_px), anchor="ls"
    )
    left, top, right, bottom = canvas.getbbox() or (0, 0, 1, 1)
    glyph = canvas.crop((left, top, right, bottom))
    if glyph.width > _MAX_GLYPH_WIDTH_PX:
        glyph = glyph.resize((_MAX_GLYPH_WIDTH_PX, glyph.height), Image.Resampling.BOX)
    return glyph, baseline - top
