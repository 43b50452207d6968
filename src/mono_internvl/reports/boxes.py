"""Boxes that a model writes in its answers, and where they lie in the image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from mono_internvl.processing.prompts import parse_boxes

BOX_SCALE = 1000
"""Edges are thousandths of the image's width and height."""

_COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
_SMALLEST_EDGE_PX = 448  # below, words cannot be read; the picture is made larger
_LONGEST_LABEL = 60

_PHRASE = re.compile(r"<ref>(?P<label>.*?)</ref>\s*<box>(?P<boxes>.*?)</box>", re.DOTALL)


@dataclass(frozen=True)
class Box:
    """A named rectangle, in thousandths of the image's width and height.

    Attributes:
        label: what it is said to hold; empty if the text names nothing.
        x1: left edge; likewise y1 (top), x2 (right) and y2 (bottom), each in [0, 1000].
    """

    label: str
    x1: int
    y1: int
    x2: int
    y2: int

    @property
    def width(self) -> int:
        """Width in thousandths of the image's width."""
        return self.x2 - self.x1

    @property
    def height(self) -> int:
        """Height in thousandths of the image's height."""
        return self.y2 - self.y1


def boxes_to_draw(text: str) -> tuple[Box, ...]:
    """Return the boxes in an answer, in the order in which they are written.

    Reads `<ref>red circle</ref><box>[[x1, y1, x2, y2]]</box>`, several boxes behind one name, and
    bare `[x1, y1, x2, y2]`. Edges beyond the image are moved onto its border; what has no area left
    is dropped, for it cannot be drawn.

    Args:
        text: an answer, control tokens kept or not.

    Returns:
        The boxes; empty if the text holds none that can be read.
    """
    found: list[Box] = []
    end = 0
    for phrase in _PHRASE.finditer(text):
        found += _bare_boxes("", text[end : phrase.start()])
        found += _bare_boxes(phrase["label"].strip(), phrase["boxes"])
        end = phrase.end()
    found += _bare_boxes("", text[end:])
    return tuple(found)


def _bare_boxes(label: str, text: str) -> list[Box]:
    boxes = []
    for edges in parse_boxes(text):
        x1, y1, x2, y2 = (min(edge, BOX_SCALE) for edge in edges)
        if x1 < x2 and y1 < y2:
            boxes.append(Box(label, x1, y1, x2, y2))
    return boxes


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Draw boxes with their labels on a copy of an image.

    Args:
        image: Of any mode; a small one is made larger, by a whole number, so that labels are read.
        boxes: What to draw; equal labels share a colour.

    Returns:
        An RGB image.
    """
    scale = max(1, -(-_SMALLEST_EDGE_PX // max(image.size)))
    size = (image.width * scale, image.height * scale)
    drawn = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    width, height = drawn.size
    line = max(2, round(max(drawn.size) / 250))
    font = font_of(max(12, round(max(drawn.size) / 28)))
    pen = ImageDraw.Draw(drawn)
    labels = list(dict.fromkeys(box.label for box in boxes))
    for box in boxes:
        colour = _COLOURS[labels.index(box.label) % len(_COLOURS)]
        left, right = (x * (width - 1) // BOX_SCALE for x in (box.x1, box.x2))
        top, bottom = (y * (height - 1) // BOX_SCALE for y in (box.y1, box.y2))
        pen.rectangle((left, top, right, bottom), outline=colour, width=line)
        if box.label:
            _write_label(pen, " ".join(box.label.split()), (left, top), colour, font, drawn.size)
    return drawn


def font_of(size_px: int) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings, which has Latin, Greek and Cyrillic letters and arrows."""
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(file), size_px)


def _write_label(
    pen: ImageDraw.ImageDraw,
    label: str,
    corner: tuple[int, int],
    colour: str,
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
) -> None:
    """White on the box's colour, above its corner where there is room, never beyond the image."""
    text = label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 1]}…"
    x0, y0, x1, y1 = pen.textbbox((0, 0), text, font=font)
    wide, high = round(x1 - x0) + 6, round(y1 - y0) + 6
    left = max(0, min(corner[0], size[0] - wide))
    top = corner[1] - high if corner[1] >= high else min(corner[1], size[1] - high)
    pen.rectangle((left, top, left + wide, top + high), fill=colour)
    pen.text((left + 3 - x0, top + 3 - y0), text, fill="white", font=font)
