"""The report of a run: one page that holds everything and asks the network for nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from mono_internvl.reports import page
from mono_internvl.reports.charts import Curve, Progress, loss_chart, progress_chart
from mono_internvl.reports.gallery import PARTLY, RIGHT, WRONG, Gallery, make_gallery
from mono_internvl.reports.kinds import Kind, TextChart, Words
from mono_internvl.runs.predictions import read_answers
from mono_internvl.runs.schemas import (
    START,
    RunMetrics,
    Score,
    StageResult,
    Target,
    Threshold,
    read_losses,
    read_metrics,
)

_NUM_SAMPLES = 24
_NOT_KNOWN = "–"
_NOT_SCORED = Score(value=None, blind=None, chance=None, items=None)


@dataclass(frozen=True)
class Panel:
    """A small chart with its words.

    Attributes:
        title: heading.
        note: what the score means.
        svg: the chart.
    """

    title: str
    note: str
    svg: str


@dataclass(frozen=True)
class Row:
    """A row of figures, one for each stage.

    Attributes:
        title: what is measured.
        values: the figures; None where it was not.
        blind: with the image hidden; likewise `chance`.
        items: number of held-out items.
    """

    title: str
    values: Sequence[float | None]
    blind: float | None = None
    chance: float | None = None
    items: float | None = None


def write_report(run: Path, words: Words | None = None) -> Path:
    """Write `report.html` into the folder of a run.

    The page is one file with inline styles, charts and pictures; it makes no request and needs no
    script. Whatever the run did not leave is left out of the page with a note. Equal runs give
    equal bytes.

    Args:
        run: folder with `metrics.json` and, where they exist, `<stage>/metrics.jsonl`,
            `predictions/<stage>.jsonl` and `data/` with the images.
        words: what is said about it; its bare figures unless given.

    Returns:
        The path of the page.

    Raises:
        TrainingStateError: if `metrics.json` is absent or malformed.
        SampleError: if a line of the steps or the predictions is malformed.
    """
    metrics, words = read_metrics(run), words or Words()
    curves = [Curve(stage.label, read_losses(run, stage.name)) for stage in metrics.stages]
    curves = [curve for curve in curves if curve.losses]
    label, gallery = _gallery(run, metrics, words)
    html = (
        _environment()
        .from_string(page.PAGE)
        .render(
            style=Markup(page.STYLE),
            run=metrics,
            words=words,
            num_met=sum(target.is_met for target in metrics.targets),
            num_aims=sum(target.is_met and target.reaches_aim for target in metrics.targets),
            loss_wide=loss_chart(curves) if curves else "",
            loss_narrow=loss_chart(curves, width_in=4.6, height_in=3.2) if curves else "",
            gallery=gallery,
            gallery_label=label,
            has_boxes=any(sample.true_boxes or sample.said_boxes for sample in gallery.samples),
            verdicts=[verdict for verdict in (RIGHT, PARTLY, WRONG) if gallery.counts[verdict]],
            **_seeing(metrics.stages, words),
            **_language(metrics, words),
        )
    )
    path = run / "report.html"
    partial = path.with_name("report.html.partial")
    partial.write_text(html.strip() + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def _gallery(run: Path, metrics: RunMetrics, words: Words) -> tuple[str, Gallery]:
    """Return the last stage that kept answers, and samples of them."""
    for stage in reversed(metrics.stages):
        answers = read_answers(run, stage.name)
        if answers:
            return stage.label, make_gallery(answers, run / "data", _NUM_SAMPLES, words)
    return "", Gallery((), 0, 0.0)


def _seeing(stages: Sequence[StageResult], words: Words) -> dict[str, object]:
    """Return what the section on images needs: stages that have scores, panels, rows."""
    tested = [stage for stage in stages if _seen_kinds([stage], words)]
    labels = [stage.label for stage in tested]
    panels, rows = [], []
    for kind in _seen_kinds(tested, words):
        scores = [stage.scores.get(kind.name, _NOT_SCORED) for stage in tested]
        values = [score.value for score in scores]
        blind = [score.blind for score in scores]
        chance = [score.chance for score in scores]
        items = _last([score.items for score in scores])
        rows.append(Row(kind.title, values, _last(blind), _last(chance), items))
        chart = progress_chart(Progress(labels, values, blind, chance), kind.title)
        note = f"{kind.measure} · n = {items:,.0f}" if items else kind.measure
        panels.append(Panel(kind.title, note, chart))
    return {"stage_labels": labels, "panels": panels, "score_rows": rows}


def _seen_kinds(stages: Iterable[StageResult], words: Words) -> list[Kind]:
    """Return the kinds that have scores."""
    names = {
        name for stage in stages for name, score in stage.scores.items() if score.value is not None
    }
    return words.in_order(names)


def _language(metrics: RunMetrics, words: Words) -> dict[str, object]:
    """Return what the section on text needs: columns, panels, rows and the marks of identity."""
    columns: list[tuple[str, Mapping[str, float], bool | None]] = [
        (stage.label, stage.text, stage.is_text_identical)
        for stage in metrics.stages
        if stage.text or stage.is_text_identical is not None
    ]
    has_start = any(stage.name == START and stage.text for stage in metrics.stages)
    if metrics.language and not has_start:
        columns.insert(0, (START, metrics.language, None))
    labels = [label for label, _, _ in columns]
    measured = {name for _, text, _ in columns for name in text}
    titles = words.text_measures or {name: name.replace("_", " ") for name in sorted(measured)}
    rows = {
        name: Row(title, [text.get(name) for _, text, _ in columns])
        for name, title in titles.items()
        if name in measured
    }
    identical = [is_identical for _, _, is_identical in columns]
    return {
        "text_labels": labels,
        "text_rows": list(rows.values()),
        "text_panels": [
            _text_panel(chart, labels, rows[chart.name])
            for chart in words.text_charts
            if chart.name in rows
        ],
        "identical": identical,
        "has_identity": any(is_identical is not None for is_identical in identical),
    }


def _text_panel(chart: TextChart, labels: Sequence[str], row: Row) -> Panel:
    progress = Progress(labels, row.values, top=chart.top)
    return Panel(chart.title, chart.note, progress_chart(progress, chart.title, chart.decimals))


def _last(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters.update(value=_value, bound=_bound, short=_short, whole=_whole)
    return environment


def _value(value: Threshold) -> str:
    """Write a measured value with the digits that decide whether a target is met."""
    if value is None:
        return _NOT_KNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _bound(bound: Threshold, target: Target) -> str:
    """Write a threshold with its direction."""
    if isinstance(bound, bool | str) or bound is None:
        return _value(bound)
    return f"{'≥' if target.higher_is_better else '≤'} {bound:,.3g}"


def _short(number: float | None) -> str:
    return _NOT_KNOWN if number is None else f"{number:,.1f}"


def _whole(number: float | None) -> str:
    return _NOT_KNOWN if number is None else f"{number:,.0f}"
