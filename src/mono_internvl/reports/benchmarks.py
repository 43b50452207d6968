"""Results on published benchmarks as a table and as a radar chart; others' figures stand apart."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from mono_internvl.reports.markdown import table
from mono_internvl.runs.benchmark_results import (
    CORRECTED,
    PAPER,
    BenchmarkResult,
    PublishedScore,
    read_results,
)
from mono_internvl.runs.folder import write_whole

PAGE, RADAR = "table.md", "radar.svg"
_FEWEST_AXES = 3
_OURS = "#1f5fbf"
_OTHERS = ("#8a8a8a", "#b98b3e", "#7a9a6a", "#a77a9a", "#6f9fae")
_MOST_OTHERS = 3


def write_pages(folder: Path) -> list[Path]:
    """Write the table and, of three benchmarks or more, the chart beside the results.

    Raises:
        SampleError: The folder holds no results.
    """
    model, results = read_results(folder)
    written = [folder / PAGE]
    write_whole(written[0], markdown(model, results))
    if (chart := radar(model, results)) is not None:
        written.append(folder / RADAR)
        write_whole(written[1], chart)
    return written


def markdown(model: str, results: Sequence[BenchmarkResult]) -> str:
    """Measured scores, then published ones in a table of their own, then notes."""
    measured = [
        (
            one.title,
            one.split,
            one.unit,
            _cell(one.scores.get(PAPER), one.unit),
            _cell(one.scores.get(CORRECTED), one.unit),
            f"{one.answered:,}",
            one.judge or "",
        )
        for one in results
    ]
    columns = ("benchmark", "split", "unit", "paper's rules", "corrected", "answers", "judge")
    parts = [
        f"# {model}",
        "Measured. The first score follows the rules of the published figures, the second leaves "
        "known quirks of theirs out; an empty cell needs a judge or a server.",
        table(columns, measured, numbers=False),
    ]
    others = list(dict.fromkeys(p.model for one in results for p in one.published))
    if others:
        rows = []
        for one in results:
            scores = {p.model: p.score for p in one.published}
            sources = "; ".join(dict.fromkeys(p.source for p in one.published))
            if scores:
                cells = (_cell(scores.get(name), one.unit) for name in others)
                rows.append((one.title, one.unit, *cells, sources))
        parts += [
            "## Published by others, not measured here",
            table(("benchmark", "unit", *others, "source"), rows, numbers=False),
        ]
    notes = [f"- {one.title}: {note}" for one in results for note in one.notes]
    if notes:
        parts += ["## To compare, know", "\n".join(notes)]
    return "\n\n".join(parts) + "\n"


def _cell(score: float | None, unit: str) -> str:
    if score is None:
        return ""
    return f"{score:.0f}" if unit.startswith("points") else f"{score:.1f}"


def radar(model: str, results: Sequence[BenchmarkResult]) -> str | None:
    """Scores as parts of the best possible, as SVG; None of fewer than three benchmarks.

    Ours by the paper's rules is one filled shape; published scores are dashed lines, and points
    of another split are left out.
    """
    shown = [one for one in results if one.scores.get(PAPER) is not None]
    if len(shown) < _FEWEST_AXES:
        return None
    angles = [2 * math.pi * i / len(shown) for i in range(len(shown))]
    with matplotlib.rc_context({"svg.hashsalt": "radar", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9.0, 8.0))
        axes = figure.add_subplot(polar=True)
        ours = [(one.scores[PAPER] or 0.0) / one.top for one in shown]
        around = [*angles, angles[0]]
        axes.plot(around, [*ours, ours[0]], color=_OURS, lw=2.2, label=f"{model}, measured")
        axes.fill(angles, ours, color=_OURS, alpha=0.18)
        names = dict.fromkeys(p.model for one in shown for p in one.published)
        for name, colour in zip(list(names)[:_MOST_OTHERS], _OTHERS, strict=False):
            values = [_same_split(one.published, name, one.top) for one in shown]
            axes.plot(
                around,
                [*values, values[0]],
                color=colour,
                lw=1.2,
                ls="--",
                marker="o",
                ms=3,
                label=f"{name}, published",
            )
        axes.set_xticks(
            angles, [f"{one.title}  {_cell(one.scores[PAPER], one.unit)}" for one in shown]
        )
        for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
            side = math.cos(angle)  # words stand beside the circle, not across it
            label.set_ha("left" if side > 0.1 else "right" if side < -0.1 else "center")
        axes.set_yticks([0.25, 0.5, 0.75], ["25 %", "50 %", "75 % of the best"])
        axes.set_rlabel_position(180 / len(shown))  # between the first two axes
        axes.set_ylim(0, 1)
        axes.tick_params(labelsize=8)
        axes.tick_params(axis="y", labelsize=7, labelcolor=_OTHERS[0])
        figure.legend(loc="lower center", ncols=2, frameon=False, fontsize=9)
        figure.subplots_adjust(left=0.22, right=0.78, bottom=0.16)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()


def _same_split(published: Sequence[PublishedScore], model: str, top: float) -> float:
    """A published score as a part of the best possible; nan where there is none of this split."""
    return next(
        (
            one.score / top
            for one in published
            if one.model == model and "not this split" not in one.source
        ),
        math.nan,
    )
