"""`mono-internvl lab evip-plus-plus`: EViP, EViP++ at equal data, EViP++ at 42 %, over seeds.

Each arm is the quickstart's path (world, shipped language model, four stages, an evaluation after
each) with another recipe and other experts. Arms of one seed share the world, the order of the data
and the first weights of the patch embedding and the projector.

What it can show: what the two orders of learning do at this scale, and how far seeds lie apart.
What it cannot: the paper's claim, which is about a 2B model, hundreds of millions of images and
re-organised data that nobody outside has seen. The rates are those of the miniature, which were
chosen for EViP; EViP++ has none of its own.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mono_internvl import miniature
from mono_internvl.errors import ConfigError
from mono_internvl.miniature import WorldFiles
from mono_internvl.model.visual_options import EXPERT_PRESETS
from mono_internvl.pipelines.language import give_eyes
from mono_internvl.pipelines.quickstart import (
    FULL,
    QUICK,
    SHIPPED_LANGUAGE_MODEL,
    START,
    Plan,
    collect,
    train_and_evaluate,
    write_whole,
)
from mono_internvl.recipes.evip_plus_plus import SHARE_OF_EVIP
from mono_internvl.recipes.miniature_plus_plus import plus_plus
from mono_internvl.training.distributed import run_processes
from mono_internvl.training.recipe import Recipe
from mono_internvl.training.state import exclusive, versions

ROWS, TABLE, METRICS = "rows.jsonl", "table.md", "metrics.json"


@dataclass(frozen=True)
class Arm:
    """One way to pre-train.

    Attributes:
        name: Of its folder.
        title: Of its column.
        recipe: Its four stages.
        visual_experts: Of the model it starts from.
    """

    name: str
    title: str
    recipe: Recipe
    visual_experts: tuple[str, ...]


@dataclass(frozen=True)
class MeasuredRow:
    """One figure of one arm and seed.

    Attributes:
        arm: Name of the arm.
        seed: Of world, data order and first weights.
        stage: After which it was measured.
        measure: What; a kind of held-out question, or of text.
        value: The figure; of a kind, the mean score.
        items: Records behind it; None where it is not a mean over records.
        command: That made it.
        device: It was made on.
        versions: Of what made it, commit included.
        date: Day, as 2026-01-31.
    """

    arm: str
    seed: int
    stage: str
    measure: str
    value: float
    items: int | None
    command: str
    device: str
    versions: Mapping[str, str]
    date: str


def arms_of(recipe: Recipe) -> tuple[Arm, ...]:
    """The three arms that a recipe of EViP's four stages is compared in."""
    v1, v1_5 = EXPERT_PRESETS["v1"], EXPERT_PRESETS["v1_5"]
    percent = round(100 * SHARE_OF_EVIP)
    return (
        Arm("evip", "EViP", recipe, v1),
        Arm("evip-plus-plus", "EViP++, equal data", plus_plus(recipe), v1_5),
        Arm(
            f"evip-plus-plus-{percent}",
            f"EViP++, {percent} % of the pre-training data",
            plus_plus(recipe, SHARE_OF_EVIP),
            v1_5,
        ),
    )


def compare_pretraining(
    run: Path = Path("runs/evip-plus-plus"),
    *,
    seeds: int = 3,
    quick: bool = False,
    processes: int = 1,
    device: str = "cpu",
) -> Path:
    """Train and evaluate every arm with every seed; write rows and a table.

    A second call goes on where the first stopped, and may add seeds.

    Args:
        run: Output folder: `ARM/seed<n>/`, `rows.jsonl`, `table.md`.
        seeds: How many, from 0.
        quick: The same path with small numbers; its scores mean nothing.
        processes: Training processes.
        device: Of training and evaluation.

    Returns:
        The table.

    Raises:
        ConfigError: No seed, or `run` was begun with the other sizes.
    """
    if seeds < 1:
        raise ConfigError(f"seeds={seeds}; expected at least 1")
    plan = dataclasses.replace(QUICK if quick else FULL, bounds={})
    arms = arms_of(plan.recipe)
    with exclusive(run):
        _hold_to(run / "lab.json", {"quick": quick})
        rows: list[MeasuredRow] = []
        for seed in range(seeds):
            world = miniature.write_world(run / "data" / f"seed{seed}", plan.size, seed)
            for arm in arms:
                folder = run / arm.name / f"seed{seed}"
                if not (folder / METRICS).exists():
                    _run_arm(arm, arms[0].name, seed, plan, quick, world, run, processes, device)
                rows += _rows(arm, seed, folder)
        lines = (json.dumps(dataclasses.asdict(row)) for row in rows)
        write_whole(run / ROWS, "\n".join(lines))
        write_whole(run / TABLE, table(rows, arms, quick))
        return run / TABLE


def _hold_to(file: Path, settings: Mapping[str, Any]) -> None:
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found != settings:
            raise ConfigError(
                f"{file}: begun with {found}, now {dict(settings)}; choose another --out folder or "
                "delete this one"
            )
    write_whole(file, json.dumps(settings))


def _run_arm(
    arm: Arm,
    first: str,
    seed: int,
    plan: Plan,
    quick: bool,
    world: WorldFiles,
    run: Path,
    processes: int,
    device: str,
) -> None:
    began, folder = time.perf_counter(), run / arm.name / f"seed{seed}"
    start, eyes = (run / name / f"seed{seed}" / START / "checkpoint" for name in (arm.name, first))
    if not start.exists():
        own_eyes = eyes if eyes.exists() else None
        give_eyes(SHIPPED_LANGUAGE_MODEL, start, arm.visual_experts, seed=seed, eyes=own_eyes)
    stages = tuple(dataclasses.replace(stage, seed=seed) for stage in arm.recipe.stages)
    own = dataclasses.replace(plan, recipe=dataclasses.replace(arm.recipe, stages=stages))
    run_processes(train_and_evaluate, processes, own, world, folder, device)
    metrics = collect(folder, own, quick, device, processes, time.perf_counter() - began)
    write_whole(folder / METRICS, json.dumps(metrics, indent=2))


def _rows(arm: Arm, seed: int, folder: Path) -> list[MeasuredRow]:
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    origin = {name: metrics[name] for name in ("command", "device", "versions", "date")}
    rows = []
    for stage in metrics["stages"]:
        found: dict[str, tuple[float, int | None]] = {
            kind: (score["score"], score["items"]) for kind, score in stage["scores"].items()
        }
        found |= {f"text: {name}": (value, None) for name, value in stage["text"].items()}
        found["text-only logits as before"] = (float(stage["text_logits_identical"]), None)
        found["samples"] = (stage["samples"], None)
        found["training, CPU minutes"] = (_training_minutes(folder / stage["name"]), None)
        rows += [
            MeasuredRow(arm.name, seed, stage["name"], name, float(value), items, **origin)
            for name, (value, items) in found.items()
        ]
    return rows


def _training_minutes(folder: Path) -> float:
    costs = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("cost*.json")]
    return float(sum(cost.get("trained", 0.0) for cost in costs)) / 60


def table(rows: Sequence[MeasuredRow], arms: Sequence[Arm], quick: bool = False) -> str:
    """Markdown: after S2 the mean over seeds and each seed; text fidelity and cost below.

    Args:
        rows: Of all arms and seeds.
        arms: Columns, in order.
        quick: Adds that the scores mean nothing.
    """
    last = arms[0].recipe.stages[-1].name
    pretraining = [stage.name for stage in arms[0].recipe.stages[:-1]]
    values: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row.stage, row.measure, row.arm), []).append(row.value)

    def line(label: str, cells: Sequence[Sequence[float]]) -> str:
        return f"| {label} | " + " | ".join(map(_cell, cells)) + " |"

    seeds = len({row.seed for row in rows})
    lines = [
        f"Mean over {seeds} seed{'s' if seeds != 1 else ''} (each seed), held-out records, after "
        "S2 unless said.",
        "",
        "| | " + " | ".join(arm.title for arm in arms) + " |",
        "|---|" + "---:|" * len(arms),
    ]
    if quick:
        lines.insert(1, "A quick run: it shows that everything runs, its scores mean nothing.")
    own = ("text-only logits as before", "samples", "training, CPU minutes")
    measures = dict.fromkeys(row.measure for row in rows if row.stage == last)
    for measure in (m for m in measures if m not in own):
        lines.append(line(measure, [values.get((last, measure, arm.name), []) for arm in arms]))
    for stage in (*pretraining, last):
        lines.append(
            line(
                f"{own[0]} S1.1, after {stage} (1 is yes)",
                [values[stage, own[0], arm.name] for arm in arms],
            )
        )
    for measure in own[1:]:
        sums = []
        for arm in arms:
            by_stage = [values[stage, measure, arm.name] for stage in pretraining]
            sums.append([sum(seed) for seed in zip(*by_stage, strict=True)])
        lines.append(line(f"pre-training {measure}", sums))
    made = rows[0]
    of = ", ".join(f"{name} {value}" for name, value in versions().items())
    lines += ["", f"`{made.command}` on {made.device}, {made.date}; table by {of}."]
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""

    def said(value: float) -> str:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

    return f"{said(fmean(values))} ({', '.join(map(said, values))})"
