"""The block of docs/real.md: what a real language model reached on pictures nobody here made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mono_internvl.errors import ConfigError
from mono_internvl.reports.markdown import NOTHING, in_words, table
from mono_internvl.runs.json_lines import read_lines
from mono_internvl.runs.provenance import place_of
from mono_internvl.runs.schemas import stage_label

ROWS = "real.jsonl"
_NAMING = {
    "noto": "drawings by an artist of whom none was trained on",
    "noto-v1": "the same artist's earlier set",
    "stamps": "photographs and stamps (Tux Paint)",
    "clipart": "clip art (Open Clip Art Library)",
}
_OTHERS = {
    "animal": "is this an animal?",
    "ground": "what colour is the ground?",
    "count": "how many are there?",
    "left": "what is on the left?",
    "word": "what does it say? (ten words)",
    "never named": "things named in no training record",
}


def real_block(results: Path) -> str:
    """Naming beside chance, blind and pixels; the curve over the stages; language.

    Raises:
        ConfigError: The file holds something else than the rows of `examples/real/run.py`.
    """
    file = results / ROWS
    if not file.is_file():
        return NOTHING
    try:
        rows = [json.loads(line) for line in read_lines(file)]
        return "\n".join(part for row in rows for part in (_naming(row), _curve(row), _origin(row)))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"{file}: {error}; expected the rows of examples/real/run.py") from error


def _naming(row: Mapping[str, Any]) -> str:
    last = row["stages"][-1]["scores"]
    lines = []
    for kind, title in _NAMING.items():
        if kind in last:
            score = last[kind]
            cells = (score["score"], *row["pixels"][kind].values(), score["blind"], score["chance"])
            figures = map(_figure, (*cells, row["of_20"][kind]))
            lines.append((title, str(score["items"]), *figures))
    pixels = next(iter(row["pixels"].values()))
    head = ("naming", "items", "model", *pixels, "blind", "chance", "best of 20 by likelihood")
    return table(head, lines)


def _curve(row: Mapping[str, Any]) -> str:
    stages = row["stages"]
    lines: list[tuple[str, ...]] = [
        ("samples of the stage", *(f"{stage['samples'] or 0:,.0f}" for stage in stages))
    ]
    for kind, title in {**_NAMING, **_OTHERS}.items():
        if kind in stages[-1]["scores"]:
            lines.append((title, *(_figure(stage["scores"][kind]["score"]) for stage in stages)))
    for name, title in (("seen", "nats of the true name, held-out artist"), ("blind", "blind")):
        losses = (row["losses"][stage["name"]]["noto"][name] for stage in stages)
        lines.append((title, *map(_figure, losses)))
    lines.append(("perplexity on English", *(_figure(s["text"]["perplexity"]) for s in stages)))
    lines.append(("16 plain questions", *(_figure(s["text"]["language"]) for s in stages)))
    said = {True: "yes", False: "no", None: ""}
    same = (said[stage["text_logits_identical"]] for stage in stages)
    lines.append(("text-only logits bit for bit as before", *same))
    return table(("after", *(stage_label(stage["name"]) for stage in stages)), lines)


def _origin(row: Mapping[str, Any]) -> str:
    minutes = sum(stage["cpu_minutes"] or 0 for stage in row["stages"])
    return (
        f"{row['variant'].capitalize()}, one seed; {minutes:.0f} minutes of training on "
        f"{place_of(row)}; {in_words(row['versions'])}, {row['date']}; all figures in "
        f"`results/{ROWS}`.\n"
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
