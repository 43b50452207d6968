"""`mono-internvl lab rates`: which learning rates, by what they reach on the validation split.

All rates of the miniature's four stages are multiplied by one factor: the grid is a line, as the
shares between the groups of parameters were set once and a full grid would cost days. The held-out
split is not looked at.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from mono_internvl import miniature
from mono_internvl.compute import make_plan
from mono_internvl.distributed import run_side_by_side
from mono_internvl.evaluation.runner import Subject, ask
from mono_internvl.miniature import WorldFiles
from mono_internvl.miniature.language_model import add_vision
from mono_internvl.miniature.quickstart import (
    FULL,
    QUICK,
    SHIPPED_LANGUAGE_MODEL,
    predictions_of,
)
from mono_internvl.miniature.recipes import RATE_FACTORS
from mono_internvl.miniature.scoring import BENCHMARK, PROTOCOL, mean_scores
from mono_internvl.reports.markdown import NOTHING, in_words, table
from mono_internvl.runs.folder import begin, exclusive, write_whole
from mono_internvl.runs.provenance import Origin, origin
from mono_internvl.runs.schemas import START
from mono_internvl.training.loop import train_stage
from mono_internvl.training.recipe import Recipe

RATES = "rates.jsonl"


@dataclass(frozen=True, kw_only=True)
class RatesRun(Origin):
    """What one factor on all rates reached.

    Attributes:
        factor: On the rates of the recipe as it stands.
        quick: Whether the stages had the sizes of `quickstart --quick`.
        seed: Of the world.
        scores: Score by kind of question on the validation split, after the last stage.
    """

    factor: float
    quick: bool
    seed: int
    scores: Mapping[str, float]


def compare_rates(
    run: Path = Path("runs/rates"),
    *,
    factors: Sequence[float] = RATE_FACTORS,
    quick: bool = False,
    seed: int = 0,
    processes: int = 1,
) -> Path:
    """Train the four stages with every factor on the rates; score them on the validation split.

    A second call goes on where the first stopped, and may add factors.

    Args:
        run: Output folder.
        factors: On all rates.
        quick: The sizes of `quickstart --quick`.
        seed: Of the world.
        processes: Runs side by side, each in one process.

    Returns:
        The rows, `rates.jsonl`.
    """
    plan = QUICK if quick else FULL
    with exclusive(run):
        begin(run / "lab.json", {"quick": quick, "seed": seed})
        world = miniature.write_world(run / "data", plan.size, seed)
        rows = [run / f"factor{factor:g}" / "row.json" for factor in factors]
        left = [
            (scaled(plan.recipe, factor), factor, quick, seed, world, row)
            for factor, row in zip(factors, rows, strict=True)
            if not row.exists()
        ]
        run_side_by_side(_run, left, processes)
        finished = sorted(run.glob("factor*/row.json"))
        write_whole(run / RATES, "\n".join(row.read_text("utf-8").strip() for row in finished))
    return run / RATES


def scaled(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with all rates multiplied."""
    stages = []
    for stage in recipe.stages:
        rules = tuple(
            dataclasses.replace(
                rule,
                learning_rate=None if rule.learning_rate is None else factor * rule.learning_rate,
            )
            for rule in stage.rules
        )
        stages.append(dataclasses.replace(stage, rules=rules))
    return dataclasses.replace(recipe, stages=tuple(stages))


def _run(
    recipe: Recipe, factor: float, quick: bool, seed: int, world: WorldFiles, row: Path
) -> None:
    checkpoint = row.parent / START / "checkpoint"
    if not checkpoint.exists():
        add_vision(SHIPPED_LANGUAGE_MODEL, checkpoint, seed=seed)
    compute = make_plan("cpu", processes=1)
    for stage in recipe.stages:
        folder = row.parent / stage.name
        checkpoint = train_stage(stage, checkpoint, world.root, folder, plan=compute).checkpoint
    subject = Subject.load(checkpoint, compute)
    questions = BENCHMARK.questions(world.validation)
    out = predictions_of(row.parent, "validation")
    answers = ask(subject, BENCHMARK, PROTOCOL, questions, out=out)
    made = RatesRun(
        factor=factor,
        quick=quick,
        seed=seed,
        scores={kind: mean.score for kind, mean in mean_scores(answers).items()},
        **origin(compute, PROTOCOL.planned(compute).to_dict()),
    )
    write_whole(row, json.dumps(asdict(made)))


def rates_block(results: Path) -> str:
    """Validation scores of the committed runs, a column for each factor."""
    file = results / RATES
    if not file.is_file():
        return NOTHING
    runs = [RatesRun(**json.loads(line)) for line in file.read_text("utf-8").splitlines()]
    runs.sort(key=lambda one: one.factor)
    kinds = sorted(set.intersection(*(set(one.scores) for one in runs)))
    rows = [(kind, *(f"{one.scores[kind]:.3f}" for one in runs)) for kind in kinds]
    rows.append(("mean", *(f"{fmean(one.scores[k] for k in kinds):.3f}" for one in runs)))
    sizes = "the sizes of `--quick`" if runs[0].quick else "full sizes"
    said = f"\nSeed {runs[0].seed}, {sizes}. `{runs[0].command}`, {in_words(runs[0].versions)}.\n"
    head = ("validation split", *(f"rates x {one.factor:g}" for one in runs))
    return table(head, rows) + said
