"""Attention maps as a picture: a map per layer with bars for its segments, and lines of numbers.

Source: arXiv 2410.08202, figure 5 (the bars along the edges of a map).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

COLOURS = {"system": "#8a8a8a", "image": "#1f5fbf", "user": "#c2571a", "answer": "#2e8b57"}
"""Of the segments, by name."""

_MOST_COLUMNS = 6
_CELL_IN = 2.3

Segments = Sequence[tuple[str, int, int]]
"""Name, first token and the token behind the last."""


def attention_picture(
    title: str,
    maps: Sequence[np.ndarray],
    segments: Segments,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> bytes:
    """Draw the maps of all layers, and a small chart of each number below them.

    Args:
        title: Of the picture.
        maps: (S, S) of each layer, queries down and keys across.
        segments: Of the tokens, from 0 to their number.
        lines: Name of a number -> its value in each layer, and the value of uniform attention.

    Returns:
        A PNG.
    """
    columns = min(_MOST_COLUMNS, max(len(maps), 3))
    rows = math.ceil(len(maps) / columns)
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(
            figsize=(_CELL_IN * columns, _CELL_IN * (rows + 1) + 0.6), layout="constrained"
        )
        figure.suptitle(title)
        top, bottom = figure.subfigures(2, 1, height_ratios=(rows, 1))
        cells = np.atleast_1d(top.subplots(rows, columns)).ravel()
        for index, axes in enumerate(cells):
            if index < len(maps):
                _draw_map(axes, f"layer {index + 1}", maps[index], segments)
            else:
                axes.set_axis_off()
        names = list(dict.fromkeys(name for name, _, _ in segments))
        figure.legend(
            handles=[Patch(color=COLOURS[name], label=f"{name} tokens") for name in names],
            loc="outside lower center",
            ncols=len(names),
            frameon=False,
        )
        charts = np.atleast_1d(bottom.subplots(1, len(lines)))
        for axes, (name, (values, uniform)) in zip(charts, lines.items(), strict=True):
            _draw_lines(axes, name, values, uniform)
        out = io.BytesIO()
        FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


def _draw_map(axes: Axes, title: str, weights: np.ndarray, segments: Segments) -> None:
    """One map on a logarithmic scale, its edges marked by segment."""
    tokens = segments[-1][2]
    shown = np.where(weights > 0, weights, np.nan)
    axes.imshow(
        shown,
        norm=LogNorm(vmin=0.02 / tokens, vmax=max(10 / tokens, float(weights.max()) / 3)),
        cmap="magma",
        extent=(0, tokens, tokens, 0),
        interpolation="nearest",
    )
    axes.set_facecolor("white")
    bar = tokens / 25
    for name, start, stop in segments:
        colour, length = COLOURS[name], stop - start
        axes.add_patch(Rectangle((-1.6 * bar, start), bar, length, color=colour, clip_on=False))
        axes.add_patch(
            Rectangle((start, tokens + 0.6 * bar), length, bar, color=colour, clip_on=False)
        )
    axes.set_xlim(0, tokens)
    axes.set_ylim(tokens, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title)


def _draw_lines(axes: Axes, name: str, values: Sequence[float], uniform: Sequence[float]) -> None:
    layers = range(1, len(values) + 1)
    axes.plot(layers, uniform, color="#8a8a8a", ls="--", label="uniform")
    axes.plot(layers, values, color="#1f5fbf", marker="o", ms=3, label="model")
    axes.set_ylim(bottom=0)
    axes.set_title(name)
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=7)
