"""Charts are SVG fragments in the page's colours, equal for equal data."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from mono_internvl.reports.charts import Curve, Progress, loss_chart, progress_chart

_PROGRESS = Progress(["S1.1", "S1.2"], [0.25, 0.5], blind=[0.1, 0.1], chance=[None, 0.2])


def _is_well_formed(svg: str) -> bool:
    named = svg.replace("<svg ", '<svg xmlns:xlink="links" ', 1)
    return ElementTree.fromstring(named).tag == "svg"


def test_progress_chart_says_its_values_aloud() -> None:
    svg = progress_chart(_PROGRESS, 'Colour "<1>" & more')
    assert _is_well_formed(svg)
    assert "by stage: S1.1 0.25, S1.2 0.50." in svg
    assert 'aria-label="Colour &quot;&lt;1>&quot; &amp; more' in svg


def test_charts_use_only_colours_of_the_page() -> None:
    for svg in (progress_chart(_PROGRESS, "Colour"), loss_chart([Curve("S1.1", [2.0, 1.0])])):
        assert "var(--model)" in svg
        assert not re.search(r"(?:fill|stroke): #", svg)


def test_charts_are_deterministic_and_ask_for_nothing() -> None:
    curves = [Curve("S1.1", [3 / (1 + i / 50) for i in range(700)]), Curve("S2", [1.0])]
    for draw in (lambda: loss_chart(curves), lambda: progress_chart(_PROGRESS, "Colour")):
        svg = draw()
        assert svg == draw()
        assert "http" not in svg
        assert _is_well_formed(svg)


def test_loss_chart_marks_every_stage() -> None:
    svg = loss_chart([Curve("S1.1", [2.0] * 50), Curve("S1.2", [1.0] * 50)])
    assert ">S1.1</text>" in svg
    assert ">S1.2</text>" in svg
    assert "S1.1 ends at 2.00; S1.2 ends at 1.00" in svg


def test_progress_chart_without_values_says_so() -> None:
    assert "not measured" in progress_chart(Progress(["S2"], [None], top=None), "Perplexity")
