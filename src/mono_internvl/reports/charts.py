"""Charts as SVG to stand inside a page; their colours follow the page's light or dark style."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_INK, _MUTED, _GRID, _MODEL, _BLIND, _BACKGROUND = (
    "#010101",
    "#020202",
    "#030303",
    "#040404",
    "#050505",
    "#060606",
)
# Stand-ins: the page's style sheet gives the variables one value for light and one for dark.
_CSS_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--line)",
    _MODEL: "var(--model)",
    _BLIND: "var(--blind)",
    _BACKGROUND: "var(--card)",
}
_MAX_POINTS = 160  # on the curve of one stage
_WINDOWS = 30  # a smoothing window is this part of a stage


@dataclass(frozen=True)
class Curve:
    """Losses of one stage.

    Attributes:
        label: name of the stage.
        losses: one for each step, in nats per token.
    """

    label: str
    losses: Sequence[float]


@dataclass(frozen=True)
class Progress:
    """One measure after each stage.

    Attributes:
        labels: names of the stages, in order.
        values: the measure; None where it was not taken. Likewise `blind` and `chance`.
        top: upper end of the axis; None fits it to the values.
    """

    labels: Sequence[str]
    values: Sequence[float | None]
    blind: Sequence[float | None] = ()
    chance: Sequence[float | None] = ()
    top: float | None = 1.0


def loss_chart(curves: Sequence[Curve], width_in: float = 9.6, height_in: float = 3.4) -> str:
    """Draw the losses of all stages behind one another, smoothed, on one axis.

    Args:
        curves: the stages in order; each with at least one loss.
        width_in: width in inches of 72 px; the text keeps its size, so a phone gets a narrower one.
        height_in: height in inches.

    Returns:
        An `<svg>` element; equal input gives equal text.
    """
    with matplotlib.rc_context(_style(f"loss {width_in}")):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        axes = figure.add_subplot()
        offset, ceiling = 0, 0.0
        for index, curve in enumerate(curves):
            losses = np.asarray(curve.losses, dtype=np.float64)
            steps, middle, low, high = _smooth(losses)
            axes.fill_between(offset + steps, low, high, color=_MODEL, alpha=0.16, linewidth=0)
            axes.plot(offset + steps, middle, color=_MODEL, linewidth=1.6)
            ceiling = max(
                ceiling, float(np.quantile(middle, 0.995)), float(high[1:].max(initial=0))
            )
            if index:
                axes.axvline(offset, color=_MUTED, linewidth=0.8, dashes=(2, 3))
            axes.annotate(
                curve.label,
                (offset + len(losses) / 2, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                color=_INK,
                fontweight="bold",
            )
            offset += len(losses)
        axes.set_xlim(0, offset)
        axes.set_ylim(0, ceiling * 1.05 or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=max(3, int(width_in)), integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        _plain(axes)
        ends = "; ".join(f"{curve.label} ends at {curve.losses[-1]:.2f}" for curve in curves)
        return _svg(figure, f"Loss by step through the stages: {ends}.")


def progress_chart(progress: Progress, title: str, decimals: int = 2) -> str:
    """Draw one measure by stage against blind and chance, small enough for a phone.

    Args:
        progress: the measure.
        title: what it is, for readers who hear the page.
        decimals: digits behind the point of the last value, which is written beside its mark.

    Returns:
        An `<svg>` element; equal input gives equal text.
    """
    with matplotlib.rc_context(_style(f"progress {title}")):
        figure = Figure(figsize=(2.6, 1.6), layout="constrained")
        axes = figure.add_subplot()
        _line(axes, progress.chance, color=_BLIND, linewidth=1.4, dashes=(1, 1.8))
        _line(axes, progress.blind, color=_BLIND, linewidth=1.4, dashes=(5, 2.5))
        points = _line(
            axes,
            progress.values,
            color=_MODEL,
            linewidth=2,
            marker="o",
            markersize=5.5,
            markeredgecolor=_BACKGROUND,
            markeredgewidth=0.8,
            clip_on=False,
        )
        known = [value for _, value in points]
        top = progress.top or max([1e-9, *known]) * 1.18
        axes.set_ylim(0, top)
        axes.set_xlim(-0.25, len(progress.labels) - 0.35)
        axes.set_xticks(range(len(progress.labels)), progress.labels)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=2, min_n_ticks=2))
        _plain(axes)
        if points:
            position, value = points[-1]
            axes.annotate(
                f"{value:.{decimals}f}",
                (position, value),
                xytext=(6, 0),
                textcoords="offset points",
                ha="left",
                va="center_baseline",
                annotation_clip=False,
                color=_INK,
                fontweight="bold",
            )
        spoken = ", ".join(
            f"{progress.labels[position]} {value:.{decimals}f}" for position, value in points
        )
        return _svg(figure, f"{title} by stage: {spoken or 'not measured'}.")


def _line(axes: Axes, values: Sequence[float | None], **style: object) -> list[tuple[int, float]]:
    """Draw what is known; a value that stands alone goes right across, or it could not be seen."""
    points = [(position, value) for position, value in enumerate(values) if value is not None]
    if len(points) == 1 and "marker" not in style:
        axes.axhline(points[0][1], **style)
    elif points:
        axes.plot(*zip(*points, strict=True), **style)
    return points


def _smooth(
    losses: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return steps, running mean, and the 10 % and 90 % quantiles around each, all (N,)."""
    window = max(1, len(losses) // _WINDOWS)
    count = min(len(losses), _MAX_POINTS)
    steps = np.unique(np.linspace(0, len(losses) - 1, count).round().astype(int))
    rows = []
    for step in steps:
        near = losses[max(0, step - window // 2) : step + window // 2 + 1]
        rows.append((near.mean(), *np.quantile(near, (0.1, 0.9))))
    middle, low, high = np.asarray(rows).T
    return steps + 1, middle, low, high


def _plain(axes: Axes) -> None:
    """Leave the values and a light grid, nothing else."""
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.tick_params(length=0, labelcolor=_MUTED)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)


def _style(salt: str) -> dict[str, object]:
    return {
        "svg.fonttype": "none",  # text stays text: searchable, and in the reader's own font
        "svg.hashsalt": salt,
        "font.size": 9,
        "axes.labelcolor": _MUTED,
        "axes.facecolor": "none",
        "path.simplify": False,
    }


def _svg(figure: Figure, description: str) -> str:
    figure.patch.set_visible(False)
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</defs>", "", text, flags=re.DOTALL)  # would hold page-wide
    text = re.sub(
        r'<g id="[^"]*"', "<g", text
    )  # nothing refers to them, and pages hold many charts
    view = re.search(r'viewBox="[^"]*"', text)
    quoted = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    opening = f'<svg {view[0] if view else ""} role="img" aria-label="{quoted}">'
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
    text = re.sub(r"(font(?:-family)?): ([^;\"]*?)'[^;\"]*", r"\1: \2var(--sans)", text)
    for stand_in, variable in _CSS_VARIABLES.items():
        text = text.replace(stand_in, variable)
    return re.sub(r"\n\s*", "\n", text).strip()
