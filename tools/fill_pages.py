"""Figures of the pages: README and docs take theirs from the committed files under `results/`.

A page marks a place with `<!-- results:NAME -->` and `<!-- /results -->`; this module writes what
stands between. `python tools/fill_pages.py` fills all pages of a checkout, `--check`
changes nothing and exits with 1 where one is not up to date.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench_pages import (
    TABLES,
    comparison_block,
    data_block,
    experts_block,
    llama_block,
    profile_block,
    targets_block,
)
from cost_pages import inference_block, training_block
from real_pages import real_block

from mono_internvl.errors import ConfigError, TrainingStateError
from mono_internvl.miniature.lab_4khd import tilings_block
from mono_internvl.miniature.lab_attention import FIGURE_5
from mono_internvl.miniature.lab_best_of import best_of_block
from mono_internvl.miniature.lab_compose import compose_block
from mono_internvl.miniature.lab_experiments import LABS
from mono_internvl.miniature.lab_mpo import mpo_block
from mono_internvl.miniature.lab_pages import LAB_BLOCKS
from mono_internvl.miniature.lab_rates import rates_block
from mono_internvl.miniature.lab_seeds import seeds_block
from mono_internvl.miniature.lab_verdicts import analysis_block
from mono_internvl.miniature.lab_video import frames_block
from mono_internvl.reports.markdown import NOTHING, in_words, table
from mono_internvl.runs.json_lines import read_lines
from mono_internvl.runs.provenance import place_of
from mono_internvl.runs.schemas import RunMetrics, Score, Target, Threshold, read_metrics_file

logger = logging.getLogger(__name__)

QUICKSTART, ROWS = "quickstart.json", "rows.jsonl"
ROW_FIELDS = ("group", "what", "value", "unit", "command", "commit", "device", "versions", "date")
GROUPS = ("parity", "checkpoints", "digits", "gpu", "suite", "first-run", "serving", "training")
"""Groups of single figures in `rows.jsonl`; each is a block of its own."""

_BLOCK = re.compile(
    r"(?P<head><!-- results:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<tail><!-- /results -->)",
    re.DOTALL,
)
_ANSWER = re.compile(r"Q: (?P<question>.*)\n\s*A: (?P<answer>.*)(\n\s*\(truth: (?P<truth>.*)\))?")
_MARKER = re.compile(r"<!-- /?results\b.*?-->")


@dataclass(frozen=True)
class Row:
    """One measured figure.

    Attributes:
        group: Block that it belongs to, one of `GROUPS`.
        what: What was measured.
        value: The figure.
        unit: Of the value; empty where it has none.
        command: What gives it again.
        commit: Of the source that gave it.
        device: What it ran on.
        versions: Version by package.
        date: Day, as 2026-01-31.
    """

    group: str
    what: str
    value: float
    unit: str
    command: str
    commit: str
    device: str
    versions: Mapping[str, str]
    date: str


def pages(root: Path) -> list[Path]:
    """The pages of a checkout that may hold blocks."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def stale_pages(root: Path) -> list[Path]:
    """The pages whose blocks say something else than `results/`."""
    return [page for page in pages(root) if _filled(page, root) != page.read_text("utf-8")]


def write_pages(root: Path) -> list[Path]:
    """Fill the blocks of all pages; returns the pages that changed."""
    changed = stale_pages(root)
    for page in changed:
        page.write_text(_filled(page, root), "utf-8")
    return changed


def _filled(page: Path, root: Path) -> str:
    return fill(page.read_text("utf-8"), root / "results")


def fill(text: str, results: Path) -> str:
    """A page with its blocks filled.

    Args:
        text: The page.
        results: Folder of the measured files.

    Raises:
        ConfigError: A block of unknown name, one that is not closed, or a measured file of another
            form.
    """

    def written(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ConfigError(
                f"block results:{name} is unknown; expected one of {', '.join(BLOCKS)}"
            )
        return f"{match['head']}{BLOCKS[name](results)}{match['tail']}"

    if left := _MARKER.search(_BLOCK.sub("", text)):
        raise ConfigError(
            f"{left.group()} stands alone; expected `<!-- results:NAME -->` on a line of its own "
            "and `<!-- /results -->` after it"
        )
    return _BLOCK.sub(written, text)


def read_figures(results: Path) -> list[Row]:
    """The single figures of `rows.jsonl`; none if there is no such file.

    Raises:
        ConfigError: A line that is not a row with all its fields.
    """
    file = results / ROWS
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(read_lines(file), start=1):
        try:
            row = Row(**json.loads(line))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{file}:{number}: {error}; expected an object with {', '.join(ROW_FIELDS)}"
            ) from error
        if row.group not in GROUPS:
            raise ConfigError(
                f"{file}:{number}: group={row.group!r}; expected one of {', '.join(GROUPS)}"
            )
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------- the blocks


def _targets(results: Path) -> str:
    metrics = _quickstart(results)
    if metrics is None:
        return NOTHING
    rows = [
        (
            target.name,
            _bound(target, target.must),
            _bound(target, target.aim),
            _figure(target.value),
            _verdict(target),
        )
        for target in metrics.targets
    ]
    return table(("held-out figure", "must", "aim", "reached", "met"), rows) + _origin(metrics)


def _stages(results: Path) -> str:
    metrics = _quickstart(results)
    if metrics is None:
        return NOTHING
    stages = metrics.stages
    kinds = list(dict.fromkeys(kind for stage in stages for kind in stage.scores))
    rows = []
    for kind in kinds:
        scores = [stage.scores.get(kind, Score(None)) for stage in stages]
        last = scores[-1]
        values = [*(score.value for score in scores), last.aligned, last.blind, last.chance]
        rows.append((kind, *map(_figure, values)))
    labels = [stage.label for stage in stages]
    final = labels[-1]
    head = ("kind", *labels, f"{final}, aligned", f"{final}, blind", "chance")
    return table(head, rows) + _origin(metrics)


def _language(results: Path) -> str:
    metrics = _quickstart(results)
    if metrics is None:
        return NOTHING
    stages = metrics.stages
    names = list(dict.fromkeys(name for stage in stages for name in stage.text))
    rows = [
        (name.replace("_", " "), *(_figure(stage.text.get(name)) for stage in stages))
        for name in names
    ]
    said = {True: "yes", False: "no", None: ""}
    rows.append(("text-only logits as before", *(said[s.is_text_identical] for s in stages)))
    return table(("on text", *(stage.label for stage in stages)), rows) + _origin(metrics)


def _output(name: str) -> Callable[[Path], str]:
    def block(results: Path) -> str:
        file = results / f"{name}.txt"
        if not file.is_file():
            return NOTHING
        return f"```text\n{file.read_text('utf-8').strip()}\n```\n"

    return block


def first_answer(results: Path) -> Mapping[str, str] | None:
    """Question, answer and truth of the first picture that a quickstart asked about."""
    file = results / "quickstart.txt"
    found = _ANSWER.search(file.read_text("utf-8")) if file.is_file() else None
    return found.groupdict("") if found else None


def _first_answer(results: Path) -> str:
    found = first_answer(results)
    if found is None:
        return NOTHING
    return (
        '<img src="results/quickstart.png" width="168" alt="a held-out picture">\n\n'
        f"> {found['answer']}\n\n"
        f"The model of `make quickstart`, on a picture that it was not trained on; "
        f"truth: *{found['truth']}*\n"
    )


def _first_run(results: Path) -> str:
    """What the first commands take: a line for a figure, a column for a class of machines."""
    rows = [row for row in read_figures(results) if row.group == "first-run"]
    if not rows:
        return NOTHING
    machines = list(dict.fromkeys(row.device for row in rows))
    figures = {(row.what, row.device): f"{_figure(row.value)} {row.unit}".strip() for row in rows}
    return table(
        ("", *machines),
        (
            (what, *(figures.get((what, machine), "not measured") for machine in machines))
            for what in dict.fromkeys(row.what for row in rows)
        ),
    )


def _group(name: str) -> Callable[[Path], str]:
    def block(results: Path) -> str:
        rows = [row for row in read_figures(results) if row.group == name]
        if not rows:
            return NOTHING
        return table(
            ("what", "value", "command", "device", "versions", "commit", "date"),
            [
                (
                    row.what,
                    f"{_figure(row.value)} {row.unit}".strip(),
                    f"`{row.command}`",
                    row.device,
                    in_words(row.versions),
                    row.commit,
                    row.date,
                )
                for row in rows
            ],
        )

    return block


COMPUTED: dict[str, Callable[[Path], str]] = {
    "costs-inference": inference_block,
    "costs-training": training_block,
}
"""Blocks that are counted from configurations and recipes, whatever was measured."""
BLOCKS: dict[str, Callable[[Path], str]] = {
    "quickstart": _targets,
    "quickstart-stages": _stages,
    "quickstart-language": _language,
    "quickstart-output": _output("quickstart"),
    "test-output": _output("test"),
    **{name: _group(name) for name in GROUPS},
    "first-run": _first_run,
    "quickstart-answer": _first_answer,
    **LAB_BLOCKS,
    **{
        f"lab-{name}": analysis_block(name, lab)
        for name, lab in {**LABS, "figure-5": FIGURE_5}.items()
    },
    "quickstart-seeds": seeds_block,
    "rates": rates_block,
    "mpo": mpo_block,
    "video": frames_block,
    "compose": compose_block,
    "4khd": tilings_block,
    "best-of": best_of_block,
    "data": data_block,
    "real": real_block,
    "bench-targets": targets_block,
    "bench-experts": experts_block,
    "bench-llama": llama_block,
    "bench-profile": profile_block,
    **COMPUTED,
    **{f"bench-{what}": comparison_block(what) for what in TABLES},
}
"""Name of a block -> what writes it from the folder of measured files."""


# ------------------------------------------------------------------------------- in words


def _quickstart(results: Path) -> RunMetrics | None:
    file = results / QUICKSTART
    if not file.is_file():
        return None
    try:
        metrics = read_metrics_file(file)
    except TrainingStateError as error:
        raise ConfigError(f"{file}: not the metrics.json of a quickstart ({error})") from error
    if metrics.is_quick or not metrics.targets or not metrics.stages:
        raise ConfigError(f"{file}: a quick or unfinished run; commit that of a full quickstart")
    return metrics


def _origin(metrics: RunMetrics) -> str:
    count = metrics.processes
    return (
        f"\n`{metrics.command}`: {count} process{'es' if count != 1 else ''} on "
        f"{place_of(vars(metrics))}, {metrics.cpu_minutes:.1f} CPU minutes; "
        f"{in_words(metrics.versions)}; all rows in "
        f"`results/{QUICKSTART}`.\n"
    )


def _bound(target: Target, bound: Threshold) -> str:
    if bound is None:
        return ""
    return f"{'≥' if target.higher_is_better else '≤'} {_figure(bound)}"


def _verdict(target: Target) -> str:
    if target.value is None:
        return "not measured" if target.is_met else "**no**"
    if target.must is None:
        return "aim" if target.reaches_aim else "reported"
    if not target.is_met:
        return "**no**"
    return "must, aim" if target.reaches_aim else "must"


def _figure(value: Threshold) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def main() -> None:
    """Fill the blocks of README and docs from the committed results."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--root", type=Path, default=Path(), help="checkout; the current folder")
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = stale_pages(arguments.root) if arguments.check else write_pages(arguments.root)
    for page in found:
        logger.info("%s: %s", page, "not up to date" if arguments.check else "written")
    sys.exit(1 if arguments.check and found else 0)


if __name__ == "__main__":
    main()
