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

RUNS_FILE, MODULAR_FILE = "evip-plus-plus.jsonl", "modular.json"
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
    """One variant of `lab evip-plus-plus` with one seed.

    Attributes:
        variant: Name of the variant.
        title: Of its column.
        seed: Of world, data order and first weights.
        quick: Whether it is a check that everything runs.
        stages: Name of a stage -> name of a measure -> what was measured after it. CPU minutes are
            left out where a kill has lost some.
    """

    variant: str
    title: str
    seed: int
    quick: bool
    stages: Mapping[str, Mapping[str, Figure]]


@dataclass(frozen=True)
class ModelRow:
    """One of the two models in numbers.

    Attributes:
        parameters: In total.
        vision_parameters: Of them, what reads images: embedding, tower, projector, visual experts.
        prefill_flops: Of one image and a short question.
    """

    parameters: int
    vision_parameters: int
    prefill_flops: int


@dataclass(frozen=True)
class KindRow:
    """One kind of held-out question.

    Attributes:
        kind: Of the records.
        items: Records that the means are over.
        modular: Mean score of the baseline.
        monolithic: Mean score of the quickstart's model on the same records; None without one.
        blind: Mean score of the baseline with the images hidden, on its own selection of records.
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
        modular: The baseline's size.
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

    A field that is None says nothing, and older figures lack those that came later.

    Raises:
        ConfigError: They were.
    """
    for run in runs[1:]:
        if _said_by(run.protocol) != _said_by(runs[0].protocol):
            raise ConfigError(
                f"{where}: figures under {run.protocol} beside such under {runs[0].protocol} (None "
                "is unknown); measure them again under one protocol"
            )


def _said_by(protocol: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if protocol is None:
        return None
    return {name: value for name, value in protocol.items() if value is not None}


def read_runs(file: Path) -> list[MeasuredRun]:
    """The runs of a `runs.jsonl`.

    Raises:
        ConfigError: A line is no run.
    """
    runs = []
    for number, line in enumerate(read_lines(file), start=1):
        try:
            row = json.loads(line)
            if "arm" in row:  # the name in files older than this one
                row["variant"] = row.pop("arm")
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


def _model_row(row: dict[str, int]) -> ModelRow:
    if "eyes" in row:  # the name in files older than this one
        row["vision_parameters"] = row.pop("eyes")
    return ModelRow(**row)


def read_comparison(file: Path) -> Comparison:
    """A `comparison.json`.

    Raises:
        ConfigError: It is none.
    """
    try:
        row = json.loads(file.read_text("utf-8"))
        kinds = tuple(KindRow(**kind) for kind in row.pop("kinds"))
        modular, monolithic = _model_row(row.pop("modular")), row.pop("monolithic")
        other = None if monolithic is None else _model_row(monolithic)
        return Comparison(kinds=kinds, modular=modular, monolithic=other, **row)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{file}: {type(error).__name__}: {error}; expected the comparison.json of "
            "`mono-internvl lab modular`"
        ) from error


# ----------------------------------------------------------------------------- EViP and EViP++


class _Compared:
    """Runs by variant and seed; the first variant is what the others are held against."""

    def __init__(self, runs: Sequence[MeasuredRun]):
        self.titles = {run.variant: run.title for run in runs}
        self.seeds = sorted({run.seed for run in runs})
        self.runs = {(run.variant, run.seed): run for run in runs}
        self.first = runs[0]
        *self.pretraining, self.last = (name for name in self.first.stages if name != "start")
        self.kinds = [
            name
            for name in self.first.stages[self.last]
            if name not in (_IDENTICAL, _SAMPLES, _MINUTES)
        ]

    def values(self, variant: str, measure: str, stages: Sequence[str]) -> list[float | None]:
        """Of each seed, the sum over stages; None where a figure is missing."""
        found: list[float | None] = []
        for seed in self.seeds:
            run = self.runs.get((variant, seed))
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
    """Markdown: what each variant reached, the differences seed by seed, costs, origin.

    Args:
        runs: Of all variants and seeds, the variant that the others are held against first.
        shows: What the comparison shows and what it cannot, for the end of the page.
    """
    check_one_protocol(runs, "the runs that are compared")
    compared = _Compared(runs)
    said = {1: "one seed", 2: "two seeds", 3: "three seeds"}
    count = said.get(len(compared.seeds), f"{len(compared.seeds)} seeds")
    listed = ", ".join(map(str, compared.seeds))
    lines = [QUICK_NOTE] if compared.first.quick else []
    lines += [
        f"Held-out scores after the last stage: mean over {count} (then each: {listed}); behind a "
        "kind, its records. Perplexity is better when lower.",
        "",
        *_scores(compared),
        "",
        f"{compared.titles[compared.first.variant]} against the others, seed by seed: the runs of "
        "a seed share world, order of the data and first weights, so only a difference of one sign "
        "in all seeds says something, and few seeds say little.",
        "",
        *_differences(compared),
        "",
        "What the language model keeps, and what pre-training costs:",
        "",
        *_costs(compared),
        "",
        *_origins(compared),
        "",
        shows,
    ]
    return "\n".join(lines)


def _scores(compared: _Compared) -> list[str]:
    lines = table_head(["", *compared.titles.values()])
    for kind in compared.kinds:
        cells = [
            _cell(compared.values(variant, kind, [compared.last])) for variant in compared.titles
        ]
        lines.append(table_line([compared.label(kind), *cells]))
    return lines


def _differences(compared: _Compared) -> list[str]:
    first, *others = compared.titles
    titles = [f"{compared.titles[variant]}, minus {compared.titles[first]}" for variant in others]
    lines = table_head(["", *titles])
    for kind in compared.kinds:
        own = compared.values(first, kind, [compared.last])
        cells = []
        for variant in others:
            pairs = zip(compared.values(variant, kind, [compared.last]), own, strict=True)
            cells.append(_cell([None if None in p else p[0] - p[1] for p in pairs], "+"))  # type: ignore[operator]
        lines.append(table_line([kind.replace("_", " "), *cells]))
    return lines


def _costs(compared: _Compared) -> list[str]:
    lines = table_head(["", *compared.titles.values()])
    for stage in (*compared.pretraining, compared.last):
        cells = []
        for variant in compared.titles:
            same = compared.values(variant, _IDENTICAL, [stage])
            cells.append(", ".join("-" if x is None else "yes" if x else "no" for x in same))
        label = f"text-only logits bit for bit as at the start, after {stage_label(stage)}"
        lines.append(table_line([label, *cells]))
    rows = [(f"pre-training {_SAMPLES}", _SAMPLES), (f"pre-{_MINUTES}", _MINUTES)]
    for label, measure in rows:
        cells = [
            _cell(compared.values(variant, measure, compared.pretraining))
            for variant in compared.titles
        ]
        lines.append(table_line([label, *cells]))
    return lines


def _origins(compared: _Compared) -> list[str]:
    """One line for all runs of one origin."""
    origins: dict[str, list[str]] = {}
    for (variant, seed), run in compared.runs.items():
        origin = origin_of(vars(run))
        origins.setdefault(origin, []).append(f"{compared.titles[variant]} (seed {seed})")
    if len(origins) == 1:
        return [f"All runs: {next(iter(origins))}."]
    return [f"- {'; '.join(names)}: {origin}" for origin, names in origins.items()]


# -------------------------------------------------------------------------- the modular baseline


def modular_page(comparison: Comparison) -> str:
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
        ("of them: patch embedding, tower, projector, visual experts", "vision_parameters", 1),
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


def modular_block(results: Path) -> str:
    """The committed comparison of `lab modular`."""
    file = results / MODULAR_FILE
    if not file.is_file():
        return NOTHING
    comparison = read_comparison(file)
    if comparison.quick:
        raise ConfigError(f"{file}: a quick run; commit the comparison.json of a full lab")
    return modular_page(comparison) + "\n"


LAB_BLOCKS: dict[str, Callable[[Path], str]] = {
    "evip-plus-plus": runs_block(RUNS_FILE, evip_page),
    "images": runs_block(IMAGES_FILE, images_page),
    "modular": modular_block,
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
