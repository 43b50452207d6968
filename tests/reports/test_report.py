"""The report is one complete, safe page; what a run lacks is left out with a note."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mono_internvl.errors import MonoInternVLError
from mono_internvl.miniature.report_words import WORDS
from mono_internvl.reports.report import write_report

_VOID = {"meta", "img", "br", "link", "input"}


class _Page(HTMLParser):
    """Collects tags, attributes and text; fails where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]


def _page(run: Path) -> _Page:
    return _Page(write_report(run, WORDS).read_text(encoding="utf-8"))


def _change(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = run / "metrics.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    change(fields)
    path.write_text(json.dumps(fields), encoding="utf-8")


def test_report_holds_every_section(run: Path) -> None:
    page = _page(run)
    flat = " ".join(page.text.split())
    assert "Left out" not in flat
    for expected in ("✗ missed", "≤ 1.25", "≥ 0.45", "0123abcd", "S1.3", "35.2"):
        assert expected in flat
    assert "2 of 3" in flat
    assert flat.count("✓ identical") == 2
    assert flat.count("≠ changed") == 2
    assert len(page.with_class("sample")) == 24
    assert len(page.with_class("panel")) == 4 + 3


def test_report_of_a_run_that_nobody_describes_holds_its_figures(run: Path) -> None:
    page = _Page(write_report(run).read_text(encoding="utf-8"))
    assert len(page.with_class("panel")) == 4 and len(page.with_class("sample")) == 24
    assert "facts replayed" in page.text and "iniature" not in page.text
    assert not page.with_class("lead") and "does not show" not in page.text


def test_report_asks_the_network_for_nothing(run: Path) -> None:
    path = write_report(run, WORDS)
    html = path.read_text(encoding="utf-8")
    assert path == run / "report.html"
    assert "http://" not in html
    assert "https://" not in html
    assert "<script" not in html
    page = _Page(html)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/"))
    assert not re.search(r"@import|url\((?!#)", html)
    assert path.stat().st_size < 3_000_000


def test_report_is_deterministic(run: Path) -> None:
    first = write_report(run, WORDS).read_bytes()
    assert write_report(run, WORDS).read_bytes() == first
    assert list(run.glob("*.partial")) == []


def test_report_shows_errors_in_proportion(run: Path) -> None:
    page = _page(run)
    wrong = page.text.count("✗ wrong")
    assert wrong == 10  # 40 % of 24
    assert page.text.count("✓ right") == 14
    assert "Here 14 right, 10 wrong; over all answers 60" in " ".join(page.text.split())


def test_report_draws_true_and_predicted_boxes_where_they_are(run: Path) -> None:
    page = _page(run)
    truths, saids = ([r for r in page.with_class(name) if "x" in r] for name in ("truth", "said"))
    assert len(truths) == len(saids) == 6
    edges = ("x", "y", "width", "height")
    assert {tuple(box[edge] for edge in edges) for box in truths} == {("100", "200", "200", "200")}
    assert {tuple(box[edge] for edge in edges) for box in saids} == {("110", "210", "200", "200")}


def test_report_escapes_all_text(run: Path) -> None:
    hostile = "<script>alert('&')</script>"
    path = run / "predictions" / "s2.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row.update(question=hostile, prediction=hostile, answer=hostile, kind=hostile)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def change(fields: dict[str, Any]) -> None:
        fields.update(name=hostile, command=hostile, device=hostile, versions={hostile: hostile})
        fields["targets"][0].update(name=hostile, value=hostile)
        for stage in fields["stages"]:
            stage.update(title=hostile, trains=hostile)
            stage["scores"] = dict.fromkeys([hostile], stage["scores"].get("ocr"))

    _change(run, change)
    page = _page(run)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(hostile) > 20


@pytest.mark.parametrize(
    ("part", "note"),
    [
        ("targets", "this run has no targets"),
        ("stages", "this run has no stages"),
        ("losses", "no stage left its steps"),
        ("scores", "no stage was evaluated on images"),
        ("text", "this run measured no text"),
        ("predictions", "this run kept no answers"),
        ("grounding", "No boxes to draw"),
        ("images", "image not found"),
    ],
)
def test_report_leaves_out_what_is_missing_with_a_note(run: Path, part: str, note: str) -> None:
    assert note not in _page(run).text
    if part in ("targets", "stages"):
        _change(run, lambda fields: fields.pop(part))
    elif part == "losses":
        for path in run.glob("*/metrics.jsonl"):
            path.unlink()
    elif part == "scores":
        _change(run, lambda fields: [stage.pop("scores") for stage in fields["stages"]])
    elif part == "text":
        _change(run, lambda fields: fields.pop("llm"))
        _change(run, lambda fields: [stage.pop("text") for stage in fields["stages"]])
        _change(run, lambda fields: [s.pop("text_logits_identical") for s in fields["stages"]])
    elif part == "grounding":
        path = run / "predictions" / "s2.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in lines if "<box>" not in line), encoding="utf-8")
    else:
        shutil.rmtree(run / {"predictions": "predictions", "images": "data"}[part])
    assert note in _page(run).text


def test_report_of_an_empty_run_is_still_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}", encoding="utf-8")
    assert _page(tmp_path).text.count("eft out") == 6


def test_report_of_a_quick_run_says_so(run: Path) -> None:
    assert "Quick run." not in _page(run).text
    _change(run, lambda fields: fields.update(quick=True, stages=fields["stages"][:2]))
    (run / "predictions" / "s2.jsonl").rename(run / "predictions" / "s11.jsonl")
    page = _page(run)
    assert "Quick run." in page.text
    assert "after S1.1" in " ".join(page.text.split())


def test_report_begins_text_with_the_language_model_if_no_start_was_measured(run: Path) -> None:
    _change(
        run, lambda fields: fields.update(stages=fields["stages"][1:], llm={"perplexity": 31.5})
    )
    assert "31.5" in _page(run).text


def test_report_needs_the_metrics(tmp_path: Path) -> None:
    with pytest.raises(MonoInternVLError, match=r"metrics\.json: not found"):
        write_report(tmp_path, WORDS)
    assert list(tmp_path.iterdir()) == []
