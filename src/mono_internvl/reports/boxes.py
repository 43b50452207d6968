"""Boxes that a model writes in its answers, and where they lie in the image."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mono_internvl.processing.prompts import parse_boxes

BOX_SCALE = 1000
"""Edges are thousandths of the image's width and height."""

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
