"""`mono-internvl lab evip-plus-plus`: EViP, EViP++ at equal data, EViP++ at 42 %, over seeds.

Each variant is the quickstart's path (world, shipped language model, four stages, an evaluation
after each) with another recipe and other experts. Runs of one seed share the world, the order of
the data and the first weights of the patch embedding and the projector.

What it can show: what the two orders of learning do at this scale, and how far seeds lie apart.
What it cannot: the paper's claim, which is about a 2B model, hundreds of millions of images and
re-organised data that nobody outside has seen. The rates are those of the miniature, which were
chosen for EViP; EViP++ has none of its own.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from safetensors.torch import load_file

from mono_internvl import miniature
from mono_internvl.compute import ComputePlan, make_plan
from mono_internvl.configuration.options import EXPERT_PRESETS
from mono_internvl.data.sources import read_meta
from mono_internvl.distributed import run_processes, run_side_by_side
from mono_internvl.errors import ConfigError
from mono_internvl.miniature import WorldFiles
from mono_internvl.miniature.lab_pages import Figure, MeasuredRun, evip_page
from mono_internvl.miniature.language_model import add_vision
from mono_internvl.miniature.quickstart import (
    FULL,
    QUICK,
    SETTINGS,
    SHIPPED_LANGUAGE_MODEL,
    Plan,
    check_protocol,
    collect,
    predictions_of,
    train_and_evaluate,
)
from mono_internvl.miniature.recipes import seeded
from mono_internvl.miniature.recipes_plus_plus import plus_plus
from mono_internvl.recipes.evip_plus_plus import RATIO_TO_EVIP
from mono_internvl.runs.folder import (
    begin,
    check_settings,
    exclusive,
    resumable,
    write_whole,
)
from mono_internvl.runs.provenance import command
from mono_internvl.runs.schemas import METRICS, START, cpu_minutes, read_metrics
from mono_internvl.training.progress import lines_of
from mono_internvl.training.recipe import Recipe
from mono_internvl.training.state import digest_of_data, keep_plan, read_state

RUNS, TABLE = "runs.jsonl", "table.md"
WEIGHTS = "model.safetensors"
_BEGUN = "begun.json"


@dataclass(frozen=True)
class Variant:
    """One way to pre-train, or one model to pre-train.

    Attributes:
        name: Of its folder.
        title: Of its column.
        recipe: Its four stages.
        visual_experts: Of the model it starts from.
        config: More fields of that model's configuration.
    """

    name: str
    title: str
    recipe: Recipe
    visual_experts: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)


def pretraining_variants(recipe: Recipe) -> tuple[Variant, ...]:
    """The three variants that a recipe of EViP's four stages is compared in."""
    v1, v1_5 = EXPERT_PRESETS["v1"], EXPERT_PRESETS["v1_5"]
    percent = round(100 * RATIO_TO_EVIP)
    return (
        Variant("evip", "EViP", recipe, v1),
        Variant("evip-plus-plus", "EViP++, equal data", plus_plus(recipe), v1_5),
        Variant(
            f"evip-plus-plus-{percent}",
            f"EViP++, {percent} % of the pre-training data",
            plus_plus(recipe, RATIO_TO_EVIP),
            v1_5,
        ),
    )


@dataclass(frozen=True)
class _Task:
    """One run: a variant with a seed."""

    variant: Variant
    seed: int
    plan: Plan
    quick: bool
    world: WorldFiles
    folder: Path
    compute: ComputePlan


def compare_pretraining(
    run: Path = Path("runs/evip-plus-plus"),
    *,
    seeds: int = 3,
    quick: bool = False,
    against: Path | None = None,
    processes: int = 1,
    device: str = "cpu",
    precision: str = "auto",
    variants_of: Callable[[Recipe], tuple[Variant, ...]] = pretraining_variants,
    page: Callable[[Sequence[MeasuredRun]], str] = evip_page,
) -> Path:
    """Train and evaluate every variant with every seed; write all figures and a table.

    A second call goes on where the first stopped, and may add seeds.

    Args:
        run: Output folder: `VARIANT/seed<n>/`, `runs.jsonl`, `table.md`.
        seeds: How many, from 0.
        quick: The same path with small numbers; its scores mean nothing.
        against: Folder of a finished quickstart of seed 0 and the same sizes; it is EViP's run of
            seed 0, which then is not run again.
        processes: Runs that are trained side by side, each in one process.
        device: Of training and evaluation.
        precision: "auto", "bf16" or "fp32"; a comparison that goes on keeps what it began with,
            and one with a quickstart takes the quickstart's.
        variants_of: Recipe of EViP's four stages -> what is compared; first, what a
            quickstart trains.
        page: All runs -> the table.

    Returns:
        The table.

    Raises:
        ConfigError: No seed; `run` was begun with other sizes; or `against` is no finished
            quickstart of what that variant would train.
    """
    if seeds < 1:
        raise ConfigError(f"seeds={seeds}; expected at least 1")
    plan = dataclasses.replace(QUICK if quick else FULL, bounds={})
    variants = variants_of(plan.recipe)
    if against is not None:
        _check_quickstart(against, quick)
    with exclusive(run), resumable(run):
        begin(run / "lab.json", {"quick": quick})
        compute = make_plan(device, precision, processes=1, threads=1 if processes > 1 else None)
        if against is not None and precision == "auto":
            first = read_state(against / plan.recipe.stages[0].name / "checkpoint")
            precision = str(first.stage["precision"])
            compute = compute.with_precision(precision, reason="as in the quickstart")
        compute = keep_plan(run, compute, precision)
        if against is not None:
            for stage in (START, *(stage.name for stage in plan.recipe.stages)):
                again = f"delete {against / stage / 'text.json'} and let that quickstart ask anew"
                check_protocol(predictions_of(against, stage), compute, again)
        places = [(run / "data" / f"seed{seed}", plan.size, seed) for seed in range(seeds)]
        run_side_by_side(miniature.write_world, places, processes)
        worlds = [miniature.write_world(*place) for place in places]
        tasks = [
            _Task(variant, seed, plan, quick, world, run / variant.name / f"seed{seed}", compute)
            for seed, world in enumerate(worlds)
            for variant in variants
        ]
        for task in tasks:
            _make_start(task, run / variants[0].name / f"seed{task.seed}" / START / "checkpoint")
        folders = [task.folder for task in tasks]
        if against is not None:
            _check_same_run(against, tasks[0])
            folders[0] = against
        left = [
            (task,)
            for task, folder in zip(tasks, folders, strict=True)
            if not (folder / METRICS).exists()
        ]
        console = Console(stderr=True, highlight=False)
        console.print(f"{len(tasks)} runs, {len(tasks) - len(left)} of them done", soft_wrap=True)
        run_side_by_side(_run, left, processes)
        runs = [_measured(t.variant, t.seed, f) for t, f in zip(tasks, folders, strict=True)]
        write_whole(run / RUNS, "\n".join(json.dumps(dataclasses.asdict(one)) for one in runs))
        write_whole(run / TABLE, page(runs))
        return run / TABLE


def _check_quickstart(folder: Path, quick: bool) -> None:
    """Refuse what is no finished quickstart, or not one of the settings of EViP's run of seed 0."""
    for file, wanted in (
        (folder / SETTINGS, {"quick": quick, "llm": "shipped", "seed": 0}),
        (folder / METRICS, {}),
    ):
        check_settings(
            file, wanted, "let a quickstart of these settings finish or leave --against out"
        )


def _check_same_run(folder: Path, task: _Task) -> None:
    """Hold a quickstart against the variant that it stands for: first weights, stages and data."""

    def refuse(what: str) -> NoReturn:
        raise ConfigError(
            f"{folder}: {what}; it cannot stand for the run {task.variant.name}, seed "
            f"{task.seed}: run the quickstart again or leave --against out"
        )

    ours, theirs = (
        load_file(place / START / "checkpoint" / WEIGHTS) for place in (task.folder, folder)
    )
    if ours.keys() != theirs.keys() or any(not torch.equal(ours[k], theirs[k]) for k in ours):
        refuse("started from other weights")
    for stage in task.variant.recipe.stages:
        state = read_state(folder / stage.name / "checkpoint")
        own = json.loads(json.dumps(dataclasses.asdict(stage)))
        if own["precision"] == "auto":
            own["precision"] = task.compute.precision
        for name in sorted(set(own) & set(state.stage)):
            if own[name] != state.stage[name]:
                refuse(f"stage {stage.name} has {name}={state.stage[name]!r}, not {own[name]!r}")
        meta = task.world.root / stage.data
        if state.inputs.get("data content") != digest_of_data(meta, read_meta(meta)):
            refuse(f"stage {stage.name} was trained on other data")


def _make_start(task: _Task, weights_of: Path) -> None:
    """The model that a variant starts from, with the vision weights of the seed's first one."""
    start = task.folder / START / "checkpoint"
    if not start.exists():
        experts, own = task.variant.visual_experts, start == weights_of
        add_vision(
            SHIPPED_LANGUAGE_MODEL,
            start,
            experts,
            seed=task.seed,
            weights_of=None if own else weights_of,
            **task.variant.config,
        )


def _run(task: _Task) -> None:
    """Train and evaluate one variant with one seed."""
    began, folder = time.perf_counter(), task.folder
    # What a killed process had used up of its stage is not in the files that count CPU time.
    was_interrupted = (folder / _BEGUN).exists()
    write_whole(folder / _BEGUN, json.dumps({"command": command()}))
    plan = dataclasses.replace(task.plan, recipe=seeded(task.variant.recipe, task.seed))
    with lines_of(f"{task.variant.name} seed {task.seed}"):
        arguments = (plan, task.world, folder, task.compute)
        run_processes(train_and_evaluate, 1, *arguments, threads=task.compute.threads)
    seconds = time.perf_counter() - began
    metrics = collect(folder, plan, task.quick, task.compute, seconds, task.seed)
    dataclasses.replace(metrics, was_interrupted=was_interrupted).write(folder)


def _measured(variant: Variant, seed: int, folder: Path) -> MeasuredRun:
    """What a finished run says, whether this pipeline or the quickstart made it."""
    metrics = read_metrics(folder)
    stages = {}
    for stage in metrics.stages:
        figures = {
            kind: Figure(score.value, score.items)
            for kind, score in stage.scores.items()
            if score.value is not None
        }
        figures |= {f"text: {name}": Figure(value) for name, value in stage.text.items()}
        figures["text-only logits as before"] = Figure(float(stage.is_text_identical is True))
        figures["samples"] = Figure(stage.samples or 0)
        if not metrics.was_interrupted:
            minutes = cpu_minutes(folder / stage.name, "trained")
            figures["training, CPU minutes"] = Figure(minutes)
        stages[stage.name] = figures
    return MeasuredRun(
        variant=variant.name,
        title=variant.title,
        seed=seed,
        quick=metrics.is_quick,
        stages=stages,
        **metrics.origin,
    )
