"""What the labs of the neighbours share: finished quickstarts to begin from, rows, a page.

A lab takes the last checkpoint of quickstarts of several seeds, makes variants of it and asks all
of them the same held-out questions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mono_internvl.compute import ComputePlan, make_plan
from mono_internvl.distributed import run_side_by_side
from mono_internvl.errors import ConfigError
from mono_internvl.evaluation.perplexity import perplexity
from mono_internvl.evaluation.questions import first_of_each_kind
from mono_internvl.evaluation.runner import Subject, ask
from mono_internvl.miniature.lab_pages import QUICK_NOTE, Figure, check_one_protocol, origin_of
from mono_internvl.miniature.quickstart import SETTINGS, english_conversations
from mono_internvl.miniature.scoring import BENCHMARK, PROTOCOL, TEXT_KINDS, mean_scores
from mono_internvl.miniature.world import WorldFiles, read_world
from mono_internvl.reports.markdown import NOTHING, head, line
from mono_internvl.runs.folder import begin, exclusive, resumable, write_whole
from mono_internvl.runs.json_lines import read_lines
from mono_internvl.runs.provenance import Origin

PERPLEXITY = "perplexity on English"
MEAN = "mean of all kinds with an image"
LEAST_DIFFERENCE = 0.01
"""Of a mean score; less is not called shown: it is what some 1,500 questions tell apart."""


@dataclass(frozen=True)
class Ground:
    """A finished quickstart.

    Attributes:
        folder: Of its run.
        seed: Of its world.
        checkpoint: After its last stage.
        world: Its data.
    """

    folder: Path
    seed: int
    checkpoint: Path
    world: WorldFiles


def open_grounds(folders: Sequence[Path]) -> list[Ground]:
    """Quickstarts to begin from, each of another seed.

    Raises:
        ConfigError: A folder holds no finished quickstart, or two are of one seed.
    """
    grounds: dict[int, Ground] = {}
    for folder in folders:
        try:
            seed = int(json.loads((folder / SETTINGS).read_text("utf-8"))["seed"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{folder}: no quickstart ({error}); run `mono-internvl quickstart --out {folder}`"
            ) from error
        checkpoint = folder / "model"
        if not (checkpoint / "config.json").is_file():
            raise ConfigError(f"{folder}: not finished; run its quickstart to the end")
        if seed in grounds:
            raise ConfigError(
                f"{folder}: seed {seed}, as {grounds[seed].folder}; give runs of different seeds"
            )
        grounds[seed] = Ground(folder, seed, checkpoint, read_world(folder / "data"))
    return [grounds[seed] for seed in sorted(grounds)]


@dataclass(frozen=True, kw_only=True)
class NeighbourRun(Origin):
    """What one seed of a lab came to.

    Attributes:
        seed: Of the quickstart that it began from.
        quick: Whether it is a check that everything runs.
        cpu_minutes: Of this seed, what a kill lost not counted.
        scores: Name of a variant -> name of a measure -> figure; what all are held against first.
        facts: Further figures, such as how many pairs there were.
    """

    seed: int
    quick: bool
    cpu_minutes: float
    scores: Mapping[str, Mapping[str, Figure]]
    facts: Mapping[str, float]

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> NeighbourRun:
        """What `dataclasses.asdict` gives, read again.

        Raises:
            KeyError, TypeError, AttributeError: It is no such row.
        """
        scores = {
            variant: {name: Figure(**figure) for name, figure in figures.items()}
            for variant, figures in row["scores"].items()
        }
        return cls(**{**row, "scores": scores})


def read_neighbour_runs(file: Path) -> list[NeighbourRun]:
    """The rows of a lab, by seed.

    Raises:
        ConfigError: A line is no such row.
    """
    runs = []
    for number, text in enumerate(read_lines(file), start=1):
        try:
            runs.append(NeighbourRun.from_row(json.loads(text)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{file}:{number}: {type(error).__name__}: {error}; expected a row of a lab"
            ) from error
    return sorted(runs, key=lambda run: run.seed)


def measured(
    checkpoint: Path, ground: Ground, plan: ComputePlan, per_kind: int, out: Path
) -> dict[str, Figure]:
    """A checkpoint's held-out scores of all kinds, text ones too, and what English costs it.

    Args:
        checkpoint: Who is asked.
        ground: Whose held-out questions these are.
        plan: What to compute with.
        per_kind: Questions of each kind.
        out: File of the answers.
    """
    subject = Subject.load(checkpoint, plan)
    world = ground.world
    shown = [q for q in BENCHMARK.questions(world.heldout) if not q.record.get("aligned")]
    text = BENCHMARK.questions(world.probes_heldout)
    sets = (first_of_each_kind(some, per_kind) for some in (shown, text))
    answers = ask(subject, BENCHMARK, PROTOCOL, *sets, out=out)
    found = {k: Figure(mean.score, mean.items) for k, mean in mean_scores(answers).items()}
    of_text = {*TEXT_KINDS, "facts_replayed", "facts_never_replayed"}
    of_images = [figure for kind, figure in found.items() if kind not in of_text]
    items = sum(figure.items or 0 for figure in of_images)
    found[MEAN] = Figure(fmean(figure.value for figure in of_images), items)
    english = english_conversations(world, per_kind)
    found[PERPLEXITY] = Figure(perplexity(subject.model, subject.processor, english))
    return found


# --------------------------------------------------------------------------------- the page


def compared(runs: Sequence[NeighbourRun], titles: Mapping[str, str]) -> list[str]:
    """Lines of a table: every variant's score, mean and each seed, and the gain over the first.

    Args:
        runs: Of one lab.
        titles: Of the variants that are shown, by name; the first is held against the others.
    """
    check_one_protocol(runs, "the seeds that are compared")
    first, *others = titles
    gains = [f"{titles[other]}, gain" for other in others]
    lines = head(["held-out", *titles.values(), *gains])
    for measure in runs[0].scores[first]:
        own = _values(runs, first, measure)
        cells = [_each(_values(runs, name, measure)) for name in titles]
        for other in others:
            pairs = zip(_values(runs, other, measure), own, strict=True)
            cells.append(_each([a - b for a, b in pairs], "+"))
        items = runs[0].scores[first][measure].items
        label = measure.replace("_", " ") + (f" ({items})" if items else "")
        lines.append(line([label, *cells]))
    return lines


def verdict(runs: Sequence[NeighbourRun], variant: str, first: str, measure: str = MEAN) -> str:
    """Whether a variant is better than the first, in plain words."""
    pairs = zip(_values(runs, variant, measure), _values(runs, first, measure), strict=True)
    gains = [a - b for a, b in pairs]
    if len(gains) < 2:
        return f"one seed, which shows nothing ({gains[0]:+.3f})"
    is_clear = abs(fmean(gains)) >= LEAST_DIFFERENCE
    said = "not shown at this scale"
    if is_clear and min(gains) > 0:
        said = "shown"
    elif is_clear and max(gains) < 0:
        said = "contradicted"
    return f"**{said}** ({_each(gains, '+')} {measure}, over {len(gains)} seeds)"


def origins(runs: Sequence[NeighbourRun]) -> str:
    """What made the rows, in a line or two."""
    said = list(dict.fromkeys(origin_of(vars(run)) for run in runs))
    minutes = ", ".join(f"{run.cpu_minutes:.0f}" for run in runs)
    seeds = ", ".join(str(run.seed) for run in runs)
    quick = QUICK_NOTE if any(run.quick for run in runs) else ""
    return f"{quick}Seeds {seeds}, {minutes} CPU minutes: {'; '.join(said)}."


def _values(runs: Sequence[NeighbourRun], variant: str, measure: str) -> list[float]:
    return [run.scores[variant][measure].value for run in runs]


def _each(values: Sequence[float], sign: str = "") -> str:
    """Mean, then each seed."""
    digits = ".1f" if max(map(abs, values)) >= 10 else ".3f"
    if len(values) == 1:
        return f"{values[0]:{sign}{digits}}"
    each = ", ".join(f"{value:{sign}{digits}}" for value in values)
    return f"{fmean(values):{sign}{digits}} ({each})"


# --------------------------------------------------------------------------------- a lab's run


def run_seeds(
    quickstarts: Sequence[Path],
    run: Path,
    rows: str,
    one_seed: Callable[[Ground, Path, bool, ComputePlan], None],
    page: Callable[[Sequence[NeighbourRun]], str],
    *,
    quick: bool = False,
    processes: int = 1,
    precision: str = "auto",
) -> Path:
    """Run a lab for every seed; a second call goes on, and may add seeds.

    Args:
        quickstarts: Folders of finished quickstarts, one for each seed.
        run: Output folder: `seed<n>/`, the rows and `table.md`.
        rows: Name of the file of rows.
        one_seed: Does a seed in a folder, and leaves `row.json` there at last.
        page: Of the rows.
        quick: The same path with small numbers; its scores mean nothing.
        processes: Seeds side by side, each in one process.
        precision: "auto", "bf16" or "fp32".

    Returns:
        The table.

    Raises:
        ConfigError: A folder holds no finished quickstart, or `run` was begun otherwise.
    """
    grounds = open_grounds(quickstarts)
    with exclusive(run), resumable(run):
        plan = make_plan("cpu", precision, processes=1, threads=1 if processes > 1 else None)
        begin(run / "lab.json", {"quick": quick, "precision": plan.precision})
        tasks = [(ground, run / f"seed{ground.seed}", quick, plan) for ground in grounds]
        left = [task for task in tasks if not (task[1] / "row.json").exists()]
        run_side_by_side(one_seed, left, processes)
        found = [row.read_text("utf-8").strip() for row in sorted(run.glob("seed*/row.json"))]
        write_whole(run / rows, "\n".join(found))
        write_whole(run / "table.md", page(read_neighbour_runs(run / rows)))
    return run / "table.md"


def block_of(rows: str, page: Callable[[Sequence[NeighbourRun]], str]) -> Callable[[Path], str]:
    """What fills a page with the committed rows of a lab.

    Args:
        rows: Name of the file of rows in the folder of results.
        page: Of the rows.
    """

    def block(results: Path) -> str:
        file = results / rows
        if not file.is_file():
            return NOTHING
        runs = read_neighbour_runs(file)
        if not runs or any(run.quick for run in runs):
            raise ConfigError(f"{file}: no run, or a quick one; commit the rows of a full lab")
        return page(runs) + "\n"

    return block
