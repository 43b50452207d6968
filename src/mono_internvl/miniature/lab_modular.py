"""`mono-internvl lab modular`: the miniature's modular twin, and how it compares.

The same rendered world, language model, stages and steps as the quickstart; eyes are a small vision
tower instead of visual experts. With a finished quickstart beside it, both are held against each
other on the records that both answered.

What the comparison can show: what either design learns from this little data when both start
without any visual pre-training. What it cannot: the paper's comparison, in which the modular
model's tower has seen hundreds of millions of images before; and one seed is one draw.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mono_internvl import miniature
from mono_internvl.compute import ComputePlan, make_plan
from mono_internvl.costs.inference import parameter_table, prompt_costs
from mono_internvl.errors import ConfigError
from mono_internvl.evaluation.evaluate import evaluate
from mono_internvl.miniature import WorldFiles, WorldSize
from mono_internvl.miniature.lab_pages import origin_of, twin_page
from mono_internvl.miniature.language_model import give_eyes
from mono_internvl.miniature.quickstart import (
    METRICS,
    SETTINGS,
    SHIPPED_LANGUAGE_MODEL,
    read_rows,
)
from mono_internvl.miniature.recipes_modular import (
    MINIATURE_MODULAR,
    QUICK_MINIATURE_MODULAR,
    VISION_TOWER,
)
from mono_internvl.miniature.targets import mean_scores
from mono_internvl.released.keys import read_config
from mono_internvl.runs.folder import (
    begin,
    check_settings,
    exclusive,
    resumable,
    write_whole,
)
from mono_internvl.runs.provenance import Origin, origin
from mono_internvl.training.distributed import run_processes
from mono_internvl.training.recipe import Recipe
from mono_internvl.training.run import train_stages
from mono_internvl.training.state import keep_plan

_OTHER_RUN = "compare with a finished quickstart of the same world, or leave --against out"
TEXT_TOKENS = 32
"""Text tokens of the prompt whose operations are compared; about a question of the miniature."""


@dataclass(frozen=True)
class ModularPlan:
    """Sizes of a run.

    Attributes:
        size: Of the world; the quickstart's.
        recipe: The stages.
        per_kind: Held-out records of a kind; None is all.
        per_kind_blind: The same without the image.
        text_per_kind: Text probes of a kind.
    """

    size: WorldSize
    recipe: Recipe
    per_kind: int | None = None
    per_kind_blind: int | None = 150
    text_per_kind: int | None = 120


FULL = ModularPlan(miniature.FULL, MINIATURE_MODULAR)
QUICK = ModularPlan(miniature.QUICK, QUICK_MINIATURE_MODULAR, 20, 20, 24)


@dataclass(frozen=True)
class ModelRow:
    """One of the two models in numbers.

    Attributes:
        parameters: In total.
        eyes: Of them, what reads images: embedding, tower, projector, visual experts.
        prefill_flops: Of one image and `TEXT_TOKENS`.
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


def modular_twin(
    run: Path = Path("runs/modular"),
    *,
    against: Path | None = None,
    quick: bool = False,
    processes: int | None = None,
    device: str = "cpu",
    precision: str = "auto",
    seed: int = 0,
) -> Comparison:
    """Train the modular twin on the quickstart's data and score it on the same held-out records.

    Args:
        run: Output folder; a second call with the same arguments goes on where the first stopped.
        against: Folder of a finished quickstart of the same size and seed to compare with.
        quick: The same path with small numbers.
        processes: That share each batch; as many as the machine has cores for unless given.
        device: Of training and evaluation.
        precision: "auto", "bf16" or "fp32"; a run that goes on keeps what it began with.
        seed: Of the world.

    Returns:
        What is written to `comparison.json`, and as a table to `table.md`.

    Raises:
        ConfigError: `run` was begun with other settings, or `against` is no finished quickstart of
            the same world and language model.
    """
    plan = QUICK if quick else FULL
    settings = {"quick": quick, "seed": seed}
    other_rows = None
    if against is not None:
        check_settings(against / SETTINGS, {**settings, "llm": "shipped"}, _OTHER_RUN)
        other_rows = _last_predictions(against, plan)
    batch = math.gcd(*(stage.batch_size for stage in plan.recipe.stages))
    compute = make_plan(device, precision, processes=processes, batch_size=batch)
    with exclusive(run), resumable(run):
        begin(run / "lab.json", settings)
        compute = keep_plan(run, compute, precision)
        world = miniature.write_world(run / "data", plan.size, seed)
        if against is not None:
            marker = world.root / "world.json"
            made = json.loads(marker.read_text(encoding="utf-8"))
            check_settings(against / "data" / marker.name, made, _OTHER_RUN)
        start = run / "start" / "checkpoint"
        if not start.exists():
            give_eyes(SHIPPED_LANGUAGE_MODEL, start, visual_experts=(), vision=VISION_TOWER)
        arguments = (plan.recipe, start, world.root, run, compute)
        run_processes(train_stages, compute.processes, *arguments, threads=compute.threads)
        model = run / plan.recipe.stages[-1].name / "checkpoint"
        rows = _answers(model, world, run, plan, compute)
        comparison = Comparison(
            quick=quick,
            seed=seed,
            modular=_model_row(model),
            monolithic=None if against is None else _model_row(against / "model"),
            kinds=_kind_rows(rows, other_rows),
            against=None
            if against is None
            else origin_of(json.loads((against / METRICS).read_text(encoding="utf-8"))),
            **origin(compute),
        )
        write_whole(run / "comparison.json", json.dumps(dataclasses.asdict(comparison), indent=2))
        write_whole(run / "table.md", twin_page(dataclasses.asdict(comparison)))
        return comparison


def _answers(
    model: Path, world: WorldFiles, run: Path, plan: ModularPlan, compute: ComputePlan
) -> list[dict[str, Any]]:
    """Rows of the three evaluations: held-out, the same blind, and text probes."""
    rows = []
    for name, data, blind, per_kind in (
        ("heldout", world.heldout, False, plan.per_kind),
        ("blind", world.heldout, True, plan.per_kind_blind),
        ("probes", world.probes_heldout, False, plan.text_per_kind),
    ):
        out = run / "predictions" / f"{name}.jsonl"
        evaluate(
            model,
            data,
            blind=blind,
            device=compute.device,
            precision=compute.precision,
            out=out,
            per_kind=per_kind,
        )
        rows += read_rows(out)
    return rows


def _last_predictions(quickstart_run: Path, plan: ModularPlan) -> list[dict[str, Any]]:
    file = quickstart_run / "predictions" / f"{plan.recipe.stages[-1].name}.jsonl"
    for needed in (file, quickstart_run / METRICS):
        if not needed.is_file():
            raise ConfigError(
                f"{needed}: not there; let the quickstart of that folder finish first"
            )
    return read_rows(file)


def _kind_rows(
    rows: list[dict[str, Any]], other_rows: list[dict[str, Any]] | None
) -> tuple[KindRow, ...]:
    """Means by kind; with another model's rows, over the records that both answered."""
    sighted, other = [row for row in rows if not row["blind"]], []
    if other_rows is not None:
        ids = {row["id"] for row in sighted}
        other = [row for row in other_rows if not row["blind"] and row["id"] in ids]
        ids = {row["id"] for row in other}
        sighted = [row for row in sighted if row["id"] in ids]
    means, other_means, blind = mean_scores(sighted), mean_scores(other), mean_scores(rows, True)
    return tuple(
        KindRow(
            kind=kind,
            items=sum(kind in mean_scores([row]) for row in sighted),
            modular=mean,
            monolithic=other_means.get(kind),
            blind=blind.get(kind),
        )
        for kind, mean in means.items()
    )


def _model_row(checkpoint: Path) -> ModelRow:
    config = read_config(checkpoint)
    groups = parameter_table(config).groups
    costs = prompt_costs(config, config.num_image_tokens_per_tile, TEXT_TOKENS)
    return ModelRow(
        parameters=groups.total,
        eyes=groups.patch_embedding
        + groups.vision_tower
        + groups.projector
        + groups.visual_experts,
        prefill_flops=costs.prefill.total,
    )
