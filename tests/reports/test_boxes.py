"""Boxes are read from answers as they are written, and only those that can be drawn."""

from __future__ import annotations

import pytest

from mono_internvl.reports.boxes import Box, boxes_to_draw


def test_boxes_to_draw_reads_label_and_edges() -> None:
    text = "see <ref>red star</ref><box>[[1, 2, 30, 40]]</box>."
    assert boxes_to_draw(text) == (Box("red star", 1, 2, 30, 40),)
    assert (boxes_to_draw(text)[0].width, boxes_to_draw(text)[0].height) == (29, 38)


def test_boxes_to_draw_keeps_the_order_of_several() -> None:
    text = "[[5,5,6,6]] <ref>cat</ref><box>[[0, 0, 9, 9], [1, 1, 8, 8]]</box> and [[7, 7, 9, 9]]"
    assert [(box.label, box.x1) for box in boxes_to_draw(text)] == [
        ("", 5),
        ("cat", 0),
        ("cat", 1),
        ("", 7),
    ]


def test_boxes_to_draw_moves_edges_onto_the_border() -> None:
    assert boxes_to_draw("[[900, 10, 1200, 20]]") == (Box("", 900, 10, 1000, 20),)


@pytest.mark.parametrize(
    "text",
    ["", "no box", "[[1, 2, 3]]", "[[9, 0, 1, 5]]", "[[1, 1, 1, 5]]", "[[1001, 0, 1100, 5]]"],
)
def test_boxes_to_draw_leaves_out_what_cannot_be_drawn(text: str) -> None:
    assert boxes_to_draw(text) == ()
