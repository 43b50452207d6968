"""Tables of speed in the docs, from the rows of `mono-internvl bench WHAT --out results`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mono_internvl.attention.blocked import BLOCKED
from mono_internvl.bench.experts import FFN, PROJECTION
from mono_internvl.bench.rows import BENCH_ROWS, TARGETS, BenchRow, Claim, read_rows
from mono_internvl.errors import ConfigError
from mono_internvl.reports.markdown import NOTHING, in_words, table
from mono_internvl.runs.json_lines import read_lines

TABLES = ("prefill", "modular", "decode", "prefix", "train", "serve", "engine", "samples", "images")
"""Comparisons that have a block `bench-NAME`."""

DATA_ROWS = "data.jsonl"
_HEAD = (
    *("subject", "like for like", "p50", "p20 to p80", "n", "ratio", "GFLOP, its ratio", "GFLOP/s"),
    *("of one product's rate", "settings"),
)
_LIMIT = "share_of_gemm_rate"


def comparison_block(what: str) -> Callable[[Path], str]:
    """What writes the tables of one comparison, one for each run of it."""

    def block(results: Path) -> str:
        runs: dict[tuple[Any, ...], list[BenchRow]] = {}
        for row in read_rows(results / BENCH_ROWS):
            if row.what.partition(":")[0] == what:
                sizes = (row.what, tuple(sorted(row.shapes.items())), row.layers, row.dtype)
                origin = (row.command, row.commit, row.device, row.date)
                runs.setdefault((*sizes, *origin), []).append(row)
        return "\n".join(_table_of(rows) for rows in runs.values()) or NOTHING

    return block


def data_block(results: Path) -> str:
    """What `bench data` measured: one row of each, with its origin."""
    rows = read_rows(results / DATA_ROWS)
    if not rows:
        return NOTHING

    def value(row: BenchRow) -> str:
        if row.unit == "ratio":
            return f"{100 * row.p50:.1f} %"
        if row.ratio is not None:
            return f"{1 / row.ratio:.2f} x {row.baseline}" if row.ratio != 1 else "1"
        return f"{row.p50:,.2f} {row.unit}" if row.p50 < 10 else f"{row.p50:,.0f} {row.unit}"

    lines = (
        (
            row.what.removeprefix("data: "),
            row.subject,
            value(row),
            ", ".join(f"{name.replace('_', ' ')} {said}" for name, said in row.notes.items())
            if row.unit == "ratio"
            else "",
        )
        for row in rows
    )
    body = table(("what", "of", "value", "with"), lines)
    first = rows[0]
    return (
        f"{body}\n`{first.command}` at {first.commit}, {first.device}, {first.date}; "
        f"{in_words(first.versions)}; all rows in `results/{DATA_ROWS}`.\n"
    )


def llama_block(results: Path) -> str:
    """Ours against transformers' Llama, a line for a run: like for like, then the best of each."""
    runs: dict[tuple[Any, ...], list[BenchRow]] = {}
    for row in read_rows(results / BENCH_ROWS):
        if row.what in ("prefill", "decode"):
            run = (row.what, row.layers, row.dtype, row.command, row.commit, row.device, row.date)
            runs.setdefault(run, []).append(row)
    if not runs:
        return NOTHING
    head = ("time of ours / Llama", "dtype", "layers, width", "both sdpa", "both blocked")
    body = _table(
        (*head, "best of each", "dense / ours, both sdpa", "processor"),
        (
            (
                rows[0].what,
                rows[0].dtype,
                f"{rows[0].layers}, {rows[0].shapes['width']:,}",
                *map(_ratio, _against_llama(rows)),
                rows[0].device,
            )
            for rows in runs.values()
        ),
    )
    return (
        f"{body}\nCPU seconds; [measurements.md](measurements.md) has every row with its origin.\n"
    )


def _against_llama(rows: list[BenchRow]) -> tuple[float | None, ...]:
    """Both sdpa, both blocked, the best of each; dense / ours, both sdpa."""
    by_name = {row.subject: row for row in rows}

    def alike(row: BenchRow | None) -> float | None:
        """To the peer; of older rows, which have none, to the baseline if that attends alike."""
        if row is None:
            return None
        if row.peer_ratio is not None:
            return row.peer_ratio
        base = by_name[str(row.baseline)]
        return row.ratio if base.notes["attention"] == row.notes["attention"] else None

    def attending(kind: str, attention: str) -> list[BenchRow]:
        """Rows of one model, those first that compute every row."""
        found = [
            row
            for row in rows
            if re.match(rf"{kind}\b(?!\.)", row.subject) and row.notes["attention"] == attention
        ]
        return sorted(found, key=lambda row: bool(row.notes.get("last_layer_skip")))

    ours = {way: attending("ours v1", way) for way in ("sdpa", BLOCKED)}
    like = [alike(next(iter(ours[way]), None)) for way in ("sdpa", BLOCKED)]
    best = min(row.ratio or math.inf for row in (*ours["sdpa"], *ours[BLOCKED]))
    theirs = min(row.ratio or math.inf for row in attending("Llama", "sdpa"))
    dense = next(iter(attending("dense v1", "sdpa")), None)
    both = None
    if dense is not None:
        both = dense.peer_ratio or (dense.ratio or 0) / (ours["sdpa"][0].ratio or 1)
    return *like, best / theirs, both


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def experts_block(results: Path) -> str:
    """Expert layers: a line for a cell of the grid, a column for each way to compute it."""
    kinds: dict[str, dict[tuple[Any, ...], dict[str, BenchRow]]] = {}
    for row in read_rows(results / BENCH_ROWS):
        if row.what in (FFN, PROJECTION):
            run = (row.device, row.command, row.commit, row.dtype, row.date)
            cell = (*run, *row.shapes.values(), row.notes["pass"])
            kinds.setdefault(row.what, {}).setdefault(cell, {})[row.subject] = row
    if not kinds:
        return NOTHING
    alone = [cell[_baseline(cell)] for cells in kinds.values() for cell in cells.values()]
    origins = dict.fromkeys(f"- {_clock(one)}, {_origin(one)}\n" for one in alone)
    tables = "\n".join(_table_of_cells(list(cells.values())) for cells in kinds.values())
    return (
        f"{tables}\nMedian time of one layer, then ratios to it, each the median over "
        f"interleaved rounds.\n\n{''.join(origins)}"
    )


def _table_of_cells(cells: list[dict[str, BenchRow]]) -> str:
    first = _baseline(cells[0])
    subjects = list(dict.fromkeys(name for cell in cells for name in cell if name != first))
    lines = []
    for cell in cells:
        one = cell[first]
        ratios = (cell[name].ratio if name in cell else None for name in subjects)
        widths = [one.shapes["width"], one.shapes.get("ffn_width", one.shapes["width"])]
        lines.append(
            (
                one.dtype,
                " to ".join(f"{width:,}" for width in widths),
                one.notes["pass"],
                f"{one.shapes['tokens']:,}, {one.shapes['visual_tokens']:,}",
                f"{1e3 * one.p50:.4g} ms",
                *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            )
        )
    return _table(("dtype", "widths", "pass", "rows, visual", first, *subjects), lines)


def _baseline(cell: dict[str, BenchRow]) -> str:
    return str(next(iter(cell.values())).baseline)


def profile_block(results: Path) -> str:
    """Where the time goes: a table for each run, a column for each subject."""
    runs: dict[tuple[str, ...], dict[str, dict[str, BenchRow]]] = {}
    for row in read_rows(results / BENCH_ROWS):
        what, _, subject = row.what.partition(": ")
        if what == "profile":
            run = runs.setdefault((row.device, row.command, row.commit, row.date), {})
            run.setdefault(subject, {})[row.subject] = row
    tables = []
    for subjects in runs.values():
        kinds = dict.fromkeys(kind for rows in subjects.values() for kind in rows)
        first = next(iter(next(iter(subjects.values())).values()))
        body = _table(
            (f"{first.dtype}, {first.layers} layers, {first.shapes['tokens']:,} tokens", *subjects),
            (
                (kind, *(_seconds_and_share(rows.get(kind)) for rows in subjects.values()))
                for kind in kinds
            ),
        )
        tables.append(f"{body}\n{_clock(first)} and share; {_origin(first)}.\n")
    return "\n".join(tables) or NOTHING


def _seconds_and_share(row: BenchRow | None) -> str:
    return "" if row is None else f"{row.p50:.3g} s, {100 * (row.ratio or 0):.1f} %"


def targets_block(results: Path) -> str:
    """The targets with what was measured."""
    file = results / TARGETS
    if not file.is_file():
        return NOTHING
    try:
        targets = [Claim(**json.loads(line)) for line in read_lines(file)]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{file}: {error}; expected lines of `bench targets --json`") from error
    by_device: dict[str, list[Claim]] = {}
    for target in targets:
        by_device.setdefault(target.device, []).append(target)
    return "\n".join(
        (f"**{device}**\n\n" if device else "") + _table_of_targets(of_device)
        for device, of_device in by_device.items()
    )


def _table_of_targets(targets: list[Claim]) -> str:
    said = {True: "yes", False: "**no**", None: ""}
    return _table(
        ("claim", "target", "measured", "met", "conditions"),
        (
            (
                target.name,
                target.target.replace("<=", "≤").replace(">=", "≥"),
                "not measured" if target.value is None else f"{target.value:.2f}",
                said[target.met],
                target.note,
            )
            for target in targets
        ),
    )


def _table_of(rows: list[BenchRow]) -> str:
    first = rows[0]
    base = next((row for row in rows if row.subject == row.baseline), first)
    shapes = ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in first.shapes.items())
    layers = f"{first.layers} layers, " if first.layers else ""
    head = f"**{first.what}, {first.dtype}** ({layers}{shapes})\n\n"
    body = _table(
        _HEAD,
        (
            (
                row.subject,
                "" if row.peer_ratio is None else f"{row.peer_ratio:.2f} of {row.peer}",
                f"{row.p50:.4g} {row.unit}",
                f"{row.p20:.4g} to {row.p80:.4g}",
                str(row.n),
                "" if row.ratio is None else f"{row.ratio:.2f}",
                _operations(row, base),
                f"{row.gflop / row.p50:,.0f}" if row.gflop else "",
                f"{row.notes[_LIMIT]:.2f}" if _LIMIT in row.notes else "",
                ", ".join(
                    f"{k.replace('_', ' ')} {_note(v)}" for k, v in row.notes.items() if k != _LIMIT
                ),
            )
            for row in rows
        ),
    )
    against = f', ratio to "{first.baseline}"' if first.baseline else ""
    return f"{head}{body}\n{_clock(first)}{against}; {_origin(first)}.\n"


def _clock(row: BenchRow) -> str:
    return "CPU seconds" if row.clock == "cpu" else "wall seconds"


def _origin(row: BenchRow) -> str:
    """What gives the row again."""
    versions = in_words(row.versions)
    return f"`{row.command}`, {row.device}, {versions}, commit {row.commit}, {row.date}"


def _operations(row: BenchRow, base: BenchRow) -> str:
    if not row.gflop:
        return ""
    if not (row.baseline and base.gflop):
        return f"{row.gflop:,.1f}"
    return f"{row.gflop:,.1f}, {row.gflop / base.gflop:.2f}"


def _note(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not known"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table without the columns in which nothing stands."""
    columns = zip(head, *rows, strict=True)
    first, *body = zip(*(column for column in columns if any(column[1:])), strict=True)
    return table(first, body, numbers=False)
