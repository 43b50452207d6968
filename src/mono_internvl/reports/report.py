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
from mono_internvl.reports.kinds import TEXT_KINDS, Kind, in_order
from mono_internvl.runs.schemas import (
    START,
    RunMetrics,
    Score,
    StageResult,
    Target,
    Threshold,
    read_answers,
    read_losses,
    read_metrics,
)

_NUM_SAMPLES = 24
_NOT_KNOWN = "–"
_NOT_SCORED = Score(value=None, blind=None, chance=None, items=None)
_TEXT_MEASURES = {
    "perplexity": "perplexity (lower is better)",
    "facts_replayed": "facts replayed in S2",
    "facts_never_replayed": "facts never replayed",
    "name_qa": "naming from a description",
    "reading_qa": "questions about a text",
    "copying": "copying from the context",
    "lookup": "looking up one of several things in the context",
}


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


def write_report(run: Path) -> Path:
    """Write `report.html` into the folder of a run.

    The page is one file with inline styles, charts and pictures; it makes no request and needs no
    script. Whatever the run did not leave is left out of the page with a note. Equal runs give
    equal bytes.

    Args:
        run: folder with `metrics.json` and, where they exist, `<stage>/metrics.jsonl`,
            `predictions/<stage>.jsonl` and `data/` with the images.

    Returns:
        The path of the page.

    Raises:
        TrainingStateError: if `metrics.json` is absent or malformed.
        SampleError: if a line of the steps or the predictions is malformed.
    """
    metrics = read_metrics(run)
    curves = [Curve(stage.label, read_losses(run, stage.name)) for stage in metrics.stages]
    curves = [curve for curve in curves if curve.losses]
    label, gallery = _gallery(run, metrics)
    html = (
        _environment()
        .from_string(page.PAGE)
        .render(
            style=Markup(page.STYLE),
            run=metrics,
            num_met=sum(target.is_met for target in metrics.targets),
            num_aims=sum(target.is_met and target.reaches_aim for target in metrics.targets),
            loss_wide=loss_chart(curves) if curves else "",
            loss_narrow=loss_chart(curves, width_in=4.6, height_in=3.2) if curves else "",
            gallery=gallery,
            gallery_label=label,
            has_boxes=any(sample.true_boxes or sample.said_boxes for sample in gallery.samples),
            verdicts=[verdict for verdict in (RIGHT, PARTLY, WRONG) if gallery.counts[verdict]],
            **_seeing(metrics.stages),
            **_language(metrics),
        )
    )
    path = run / "report.html"
    partial = path.with_name("report.html.partial")
    partial.write_text(html.strip() + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def _gallery(run: Path, metrics: RunMetrics) -> tuple[str, Gallery]:
    """Return the last stage that kept answers, and samples of them."""
    for stage in reversed(metrics.stages):
        answers = read_answers(run, stage.name)
        if answers:
            return stage.label, make_gallery(answers, run / "data", _NUM_SAMPLES)
    return "", Gallery((), 0, 0.0)


def _seeing(stages: Sequence[StageResult]) -> dict[str, object]:
    """Return what the section on images needs: stages that have scores, panels, rows."""
    tested = [stage for stage in stages if _seen_kinds([stage])]
    labels = [stage.label for stage in tested]
    panels, rows = [], []
    for kind in _seen_kinds(tested):
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


def _seen_kinds(stages: Iterable[StageResult]) -> list[Kind]:
    """Return the kinds scored on images; the text measures have a section of their own."""
    names = {
        name
        for stage in stages
        for name, score in stage.scores.items()
        if score.value is not None and name not in TEXT_KINDS
    }
    return in_order(names)


def _language(metrics: RunMetrics) -> dict[str, object]:
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
    ordered = [name for name in _TEXT_MEASURES if name in measured]
    rows = [
        Row(_TEXT_MEASURES[name], [text.get(name) for _, text, _ in columns]) for name in ordered
    ]
    identical = [is_identical for _, _, is_identical in columns]
    return {
        "text_labels": labels,
        "text_rows": rows,
        "text_panels": _text_panels(labels, dict(zip(ordered, rows, strict=True))),
        "identical": identical,
        "has_identity": any(is_identical is not None for is_identical in identical),
    }


def _text_panels(labels: Sequence[str], rows: Mapping[str, Row]) -> list[Panel]:
    shown = (
        ("perplexity", "Perplexity", "held-out English; lower is better", None, 1),
        ("facts_replayed", "Facts, replayed", "known facts that S2 repeats", 1.0, 2),
        ("facts_never_replayed", "Facts, never replayed", "known facts no stage repeats", 1.0, 2),
    )
    return [
        Panel(
            title, note, progress_chart(Progress(labels, rows[name].values, top=top), title, digits)
        )
        for name, title, note, top, digits in shown
        if name in rows
    ]


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
