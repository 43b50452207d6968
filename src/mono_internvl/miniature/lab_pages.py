"""What the labs' runs say, as Markdown; from the files that they write, and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mono_internvl.errors import ConfigError
from mono_internvl.reports.markdown import NOTHING, in_words
from mono_internvl.reports.markdown import head as table_head
from mono_internvl.reports.markdown import line as table_line
from mono_internvl.runs.json_lines import read_lines
from mono_internvl.runs.provenance import Origin, place_of
from mono_internvl.runs.schemas import stage_label

RUNS_FILE, TWIN_FILE = "evip-plus-plus.jsonl", "modular.json"
IMAGES_FILE = "images.jsonl"
"""Names under `results/` of what the labs leave behind."""

QUICK_NOTE = "A quick run: it shows that everything runs, its scores mean nothing.\n"
_IDENTICAL, _SAMPLES, _MINUTES = "text-only logits as before", "samples", "training, CPU minutes"


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        value: Of a kind of question, the mean score.
        items: Records behind it; None where it is not a mean over records that is counted here.
    """

    value: float
    items: int | None = None


@dataclass(frozen=True, kw_only=True)
class MeasuredRun(Origin):
    """One arm of `lab evip-plus-plus` with one seed.

    Attributes:
        arm: Name of the arm.
        title: Of its column.
        seed: Of world, data order and first weights.
        quick: Whether it is a check that everything runs.
        stages: Name of a stage -> name of a measure -> what was measured after it. CPU minutes are
            left out where a kill has lost some.
    """

    arm: str
    title: str
    seed: int
    quick: bool
    stages: Mapping[str, Mapping[str, Figure]]


@dataclass(frozen=True)
class ModelRow:
    """One of the two models in numbers.

    Attributes:
        parameters: In total.
        eyes: Of them, what reads images: embedding, tower, projector, visual experts.
        prefill_flops: Of one image and a short question.
    """

    parameters: int
    eyes: int
    prefill_flops: int


@dataclass(frozen=True)
class KindRow:
    """One kind of held-out question.

    Attributes:
        kind: Of the records.
        items: Records that the means are over.
        modular: Mean score of the twin.
        monolithic: Mean score of the quickstart's model on the same records; None without one.
        blind: Mean score of the twin with the images hidden, on its own selection of records.
    """

    kind: str
    items: int
    modular: float
    monolithic: float | None
    blind: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison(Origin):
    """What `comparison.json` holds.

    Attributes:
        quick: Whether it is a check that everything runs; its scores then mean nothing.
        seed: Of the world.
        modular: The twin's size.
        monolithic: The quickstart's model's size; None without one.
        kinds: Scores, by kind.
        against: What made the quickstart's model; None without one.
    """

    quick: bool
    seed: int
    modular: ModelRow
    monolithic: ModelRow | None
    kinds: tuple[KindRow, ...]
    against: str | None


def origin_of(made: Mapping[str, Any]) -> str:
    """What made a figure, in a line.

    Args:
        made: With `command`, `processes`, `device`, `versions` and `date`.
    """
    many = "es" if made["processes"] != 1 else ""
    count = f"{made['processes']} process{many} a model"
    of = in_words(made["versions"])
    return f"`{made['command']}`, {count}, {place_of(made)}, {of}, {made['date']}"


def check_one_protocol(runs: Sequence[Origin], where: str) -> None:
    """Refuse figures for one table whose models were asked in different ways.

    Raises:
        ConfigError: They were.
    """
    for run in runs[1:]:
        if run.protocol != runs[0].protocol:
            raise ConfigError(
                f"{where}: figures under {run.protocol} beside such under {runs[0].protocol} (None "
                "is unknown); measure them again under one protocol"
            )


def read_runs(file: Path) -> list[MeasuredRun]:
    """The runs of a `runs.jsonl`.

    Raises:
        ConfigError: A line is no run.
    """
    runs = []
    for number, line in enumerate(read_lines(file), start=1):
        try:
            row = json.loads(line)
            stages = {
                stage: {name: Figure(**figure) for name, figure in figures.items()}
                for stage, figures in row.pop("stages").items()
            }
            runs.append(MeasuredRun(**row, stages=stages))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{file}:{number}: {type(error).__name__}: {error}; expected a line of the "
                "runs.jsonl that `mono-internvl lab evip-plus-plus` writes"
            ) from error
    return runs


def read_comparison(file: Path) -> Comparison:
    """A `comparison.json`.

    Raises:
        ConfigError: It is none.
    """
    try:
        row = json.loads(file.read_text("utf-8"))
        kinds = tuple(KindRow(**kind) for kind in row.pop("kinds"))
        modular, monolithic = ModelRow(**row.pop("modular")), row.pop("monolithic")
        other = None if monolithic is None else ModelRow(**monolithic)
        return Comparison(kinds=kinds, modular=modular, monolithic=other, **row)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{file}: {type(error).__name__}: {error}; expected the comparison.json of "
            "`mono-internvl lab modular`"
        ) from error


# ----------------------------------------------------------------------------- EViP and EViP++


class _Arms:
    """Runs by arm and seed; the first arm is what the others are held against."""

    def __init__(self, runs: Sequence[MeasuredRun]):
        self.titles = {run.arm: run.title for run in runs}
        self.seeds = sorted({run.seed for run in runs})
        self.runs = {(run.arm, run.seed): run for run in runs}
        self.first = runs[0]
        *self.pretraining, self.last = (name for name in self.first.stages if name != "start")
        self.kinds = [
            name
            for name in self.first.stages[self.last]
            if name not in (_IDENTICAL, _SAMPLES, _MINUTES)
        ]

    def values(self, arm: str, measure: str, stages: Sequence[str]) -> list[float | None]:
        """Of each seed, the sum over stages; None where a figure is missing."""
        found: list[float | None] = []
        for seed in self.seeds:
            run = self.runs.get((arm, seed))
            parts = [run.stages[stage].get(measure) for stage in stages] if run else [None]
            values = [part.value for part in parts if part is not None]
            found.append(sum(values) if len(values) == len(parts) else None)
        return found

    def label(self, kind: str) -> str:
        items = self.first.stages[self.last][kind].items
        return kind.replace("_", " ") + (f" ({items})" if items else "")


EVIP_SHOWS = (
    "What this shows: what two orders of learning do at this scale, with rates that were chosen "
    "for EViP. What it cannot show: the paper's claim, which is about a model hundreds of times "
    "larger and about re-organised data that were not published."
)


def evip_page(runs: Sequence[MeasuredRun]) -> str:
    """Markdown of the runs of `lab evip-plus-plus`, as `comparison_page` writes it."""
    return comparison_page(runs, EVIP_SHOWS)


IMAGES_SHOWS = (
    "What this shows: what the two options do at this size, where an image has 36 visual tokens. "
    "What it cannot show: what V2PE is for, contexts of many images that are longer than the "
    "model's positions."
)


def images_page(runs: Sequence[MeasuredRun]) -> str:
    """Markdown of the runs of `lab images`, as `comparison_page` writes it."""
    return comparison_page(runs, IMAGES_SHOWS)


def comparison_page(runs: Sequence[MeasuredRun], shows: str) -> str:
    """Markdown: what each arm reached, the differences seed by seed, what it cost, its origin.

    Args:
        runs: Of all arms and seeds, the arm that the others are held against first.
        shows: What the comparison shows and what it cannot, for the end of the page.
    """
    check_one_protocol(runs, "the runs that are compared")
    arms = _Arms(runs)
    said = {1: "one seed", 2: "two seeds", 3: "three seeds"}
    count = said.get(len(arms.seeds), f"{len(arms.seeds)} seeds")
    listed = ", ".join(map(str, arms.seeds))
    lines = [QUICK_NOTE] if arms.first.quick else []
    lines += [
        f"Held-out scores after the last stage: mean over {count} (then each: {listed}); behind a "
        "kind, its records. Perplexity is better when lower.",
        "",
        *_scores(arms),
        "",
        f"{arms.titles[arms.first.arm]} against the others, seed by seed: the arms of a seed share "
        "world, order of the data and first weights, so only a difference of one sign in all seeds "
        "says something, and few seeds say little.",
        "",
        *_differences(arms),
        "",
        "What the language model keeps, and what pre-training costs:",
        "",
        *_costs(arms),
        "",
        *_origins(arms),
        "",
        shows,
    ]
    return "\n".join(lines)


def _scores(arms: _Arms) -> list[str]:
    lines = table_head(["", *arms.titles.values()])
    for kind in arms.kinds:
        cells = [_cell(arms.values(arm, kind, [arms.last])) for arm in arms.titles]
        lines.append(table_line([arms.label(kind), *cells]))
    return lines


def _differences(arms: _Arms) -> list[str]:
    first, *others = arms.titles
    titles = [f"{arms.titles[arm]}, minus {arms.titles[first]}" for arm in others]
    lines = table_head(["", *titles])
    for kind in arms.kinds:
        own = arms.values(first, kind, [arms.last])
        cells = []
        for arm in others:
            pairs = zip(arms.values(arm, kind, [arms.last]), own, strict=True)
            cells.append(_cell([None if None in p else p[0] - p[1] for p in pairs], "+"))  # type: ignore[operator]
        lines.append(table_line([kind.replace("_", " "), *cells]))
    return lines


def _costs(arms: _Arms) -> list[str]:
    lines = table_head(["", *arms.titles.values()])
    for stage in (*arms.pretraining, arms.last):
        cells = []
        for arm in arms.titles:
            same = arms.values(arm, _IDENTICAL, [stage])
            cells.append(", ".join("-" if x is None else "yes" if x else "no" for x in same))
        label = f"text-only logits bit for bit as at the start, after {stage_label(stage)}"
        lines.append(table_line([label, *cells]))
    rows = [(f"pre-training {_SAMPLES}", _SAMPLES), (f"pre-{_MINUTES}", _MINUTES)]
    for label, measure in rows:
        cells = [_cell(arms.values(arm, measure, arms.pretraining)) for arm in arms.titles]
        lines.append(table_line([label, *cells]))
    return lines


def _origins(arms: _Arms) -> list[str]:
    """One line for all runs of one origin."""
    origins: dict[str, list[str]] = {}
    for (arm, seed), run in arms.runs.items():
        origin = origin_of(vars(run))
        origins.setdefault(origin, []).append(f"{arms.titles[arm]} (seed {seed})")
    if len(origins) == 1:
        return [f"All runs: {next(iter(origins))}."]
    return [f"- {'; '.join(names)}: {origin}" for origin, names in origins.items()]


# ------------------------------------------------------------------------------ the modular twin


def twin_page(comparison: Comparison) -> str:
    """Markdown: the scores of both models, their sizes, and what that can show."""
    models = {"modular": comparison.modular}
    if comparison.monolithic is not None:
        models["monolithic"] = comparison.monolithic
    lines = [QUICK_NOTE] if comparison.quick else []
    lines += table_head(["held-out, one seed", "records", *models, "modular, image hidden"])
    for row in comparison.kinds:
        cells = [_share(getattr(row, name)) for name in (*models, "blind")]
        lines.append(table_line([row.kind.replace("_", " "), str(row.items), *cells]))
    lines += ["", *table_head(["", *models])]
    for label, field, scale in (
        ("parameters", "parameters", 1),
        ("of them: patch embedding, tower, projector, visual experts", "eyes", 1),
        ("operations (MFLOP) to read one image and a short question", "prefill_flops", 1e6),
    ):
        cells = [f"{getattr(model, field) / scale:,.0f}" for model in models.values()]
        lines.append(table_line([label, *cells]))
    origin = f"{origin_of(vars(comparison))}."
    if comparison.monolithic is not None:
        origin += f" The monolithic model: {comparison.against}."
    lines += [
        "",
        origin,
        "",
        "What this shows: what either design learns from this little data when neither has seen an "
        "image before, in one draw; both models see the same samples in the same order. What it "
        "cannot show: the paper's comparison, in which the tower comes pre-trained on hundreds of "
        "millions of images; nor that one design is better, as the tower's rates were not tuned.",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------------------- blocks of the pages


def runs_block(name: str, page: Callable[[Sequence[MeasuredRun]], str]) -> Callable[[Path], str]:
    """What writes the committed runs of a lab.

    Args:
        name: File of runs under `results/`.
        page: All runs -> Markdown.
    """

    def block(results: Path) -> str:
        file = results / name
        if not file.is_file():
            return NOTHING
        runs = read_runs(file)
        if not runs or any(run.quick for run in runs):
            raise ConfigError(
                f"{file}: no run, or a quick one; commit the runs.jsonl of a full lab"
            )
        return page(runs) + "\n"

    return block


def twin_block(results: Path) -> str:
    """The committed comparison of `lab modular`."""
    file = results / TWIN_FILE
    if not file.is_file():
        return NOTHING
    comparison = read_comparison(file)
    if comparison.quick:
        raise ConfigError(f"{file}: a quick run; commit the comparison.json of a full lab")
    return twin_page(comparison) + "\n"


LAB_BLOCKS: dict[str, Callable[[Path], str]] = {
    "evip-plus-plus": runs_block(RUNS_FILE, evip_page),
    "images": runs_block(IMAGES_FILE, images_page),
    "modular": twin_block,
}
"""Name of a block -> what writes it from the folder of measured files."""


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _cell(values: Sequence[float | None], sign: str = "") -> str:
    """Mean, then each, in as many digits; a dash for what was not measured."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    largest = max(map(abs, known))
    digits = ",.0f" if largest >= 1000 else ".1f" if largest >= 10 else ".3f"

    def said(value: float | None) -> str:
        return "-" if value is None else f"{value:{sign}{digits}}"

    if len(values) == 1:
        return said(values[0])
    return f"{said(fmean(known))} ({', '.join(map(said, values))})"
