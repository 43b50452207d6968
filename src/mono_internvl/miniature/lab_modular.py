"""`mono-internvl lab modular`: the miniature's modular baseline, and how it compares.

The same rendered world, language model, stages and steps as the quickstart; images are read by a
small vision tower instead of visual experts. With a finished quickstart beside it, both are held
against each other on the records that both answered.

What the comparison can show: what either design learns from this little data when both start
without any visual pre-training. What it cannot: the paper's comparison, in which the modular
model's tower has seen hundreds of millions of images before; and one seed is one draw.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mono_internvl import miniature
from mono_internvl.compute import ComputePlan, make_plan
from mono_internvl.costs.inference import parameter_table, prompt_costs
from mono_internvl.distributed import run_processes
from mono_internvl.errors import ConfigError
from mono_internvl.evaluation.questions import first_of_each_kind
from mono_internvl.evaluation.runner import Subject, ask
from mono_internvl.miniature import WorldFiles, WorldSize
from mono_internvl.miniature.lab_pages import (
    Comparison,
    KindRow,
    ModelRow,
    modular_page,
    origin_of,
)
from mono_internvl.miniature.language_model import add_vision
from mono_internvl.miniature.quickstart import (
    SETTINGS,
    SHIPPED_LANGUAGE_MODEL,
    check_protocol,
    predictions_of,
)
from mono_internvl.miniature.recipes_modular import (
    MINIATURE_MODULAR,
    QUICK_MINIATURE_MODULAR,
    VISION_TOWER,
)
from mono_internvl.miniature.scoring import BENCHMARK, PROTOCOL, mean_scores
from mono_internvl.released.keys import read_config
from mono_internvl.runs.folder import (
    begin,
    check_settings,
    exclusive,
    resumable,
    write_whole,
)
from mono_internvl.runs.predictions import Prediction, read_predictions
from mono_internvl.runs.provenance import origin
from mono_internvl.runs.schemas import METRICS, read_metrics
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


def train_modular(
    run: Path = Path("runs/modular"),
    *,
    against: Path | None = None,
    quick: bool = False,
    processes: int | None = None,
    device: str = "cpu",
    precision: str = "auto",
    seed: int = 0,
) -> Comparison:
    """Train the modular baseline on the quickstart's data; score it on the same held-out records.

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
            the same world, language model and protocol.
    """
    plan = QUICK if quick else FULL
    settings = {"quick": quick, "seed": seed}
    if against is not None:
        check_settings(against / SETTINGS, {**settings, "llm": "shipped"}, _OTHER_RUN)
    batch = math.gcd(*(stage.batch_size for stage in plan.recipe.stages))
    compute = make_plan(device, precision, processes=processes, batch_size=batch)
    other: list[Prediction] = []
    with exclusive(run), resumable(run):
        begin(run / "lab.json", settings)
        compute = keep_plan(run, compute, precision)
        world = miniature.write_world(run / "data", plan.size, seed)
        if against is not None:
            marker = world.root / "world.json"
            made = json.loads(marker.read_text(encoding="utf-8"))
            check_settings(against / "data" / marker.name, made, _OTHER_RUN)
            other = _last_predictions(against, plan, compute)
        start = run / "start" / "checkpoint"
        if not start.exists():
            add_vision(SHIPPED_LANGUAGE_MODEL, start, visual_experts=(), vision=VISION_TOWER)
        arguments = (plan, start, world, run, compute)
        run_processes(_train_and_ask, compute.processes, *arguments, threads=compute.threads)
        comparison = Comparison(
            quick=quick,
            seed=seed,
            modular=_model_row(_last_checkpoint(run, plan)),
            monolithic=None if against is None else _model_row(against / "model"),
            kinds=_kind_rows(read_predictions(_answers(run)), other),
            against=None if against is None else origin_of(read_metrics(against).origin),
            **origin(compute, PROTOCOL.planned(compute).to_dict()),
        )
        write_whole(run / "comparison.json", json.dumps(dataclasses.asdict(comparison), indent=2))
        write_whole(run / "table.md", modular_page(comparison))
        return comparison


def _last_checkpoint(run: Path, plan: ModularPlan) -> Path:
    return run / plan.recipe.stages[-1].name / "checkpoint"


def _answers(run: Path) -> Path:
    return predictions_of(run, "modular")


def _train_and_ask(
    plan: ModularPlan, start: Path, world: WorldFiles, run: Path, compute: ComputePlan
) -> None:
    """In every process: the stages, then held-out questions, some of them blind, and probes."""
    train_stages(plan.recipe, start, world.root, run, compute)
    heldout = BENCHMARK.questions(world.heldout)
    sighted = first_of_each_kind(heldout, plan.per_kind)
    blind = [q.without_images() for q in first_of_each_kind(heldout, plan.per_kind_blind)]
    text = first_of_each_kind(BENCHMARK.questions(world.probes_heldout), plan.text_per_kind)
    subject = Subject.load(_last_checkpoint(run, plan), compute)
    ask(subject, BENCHMARK, PROTOCOL, sighted, blind, text, out=_answers(run))


def _last_predictions(
    quickstart_run: Path, plan: ModularPlan, compute: ComputePlan
) -> list[Prediction]:
    """A finished quickstart's answers, if they were given as the baseline's will be."""
    stage = plan.recipe.stages[-1].name
    file = predictions_of(quickstart_run, stage)
    for needed in (file, quickstart_run / METRICS):
        if not needed.is_file():
            raise ConfigError(
                f"{needed}: not there; let the quickstart of that folder finish first"
            )
    again = quickstart_run / stage / "text.json"
    check_protocol(file, compute, f"delete {again} and let that quickstart ask anew")
    return read_predictions(file)


def _kind_rows(
    predictions: Sequence[Prediction], others: Sequence[Prediction]
) -> tuple[KindRow, ...]:
    """Means by kind; with another model's answers, over the records that both answered."""
    sighted = [one for one in predictions if not one.is_blind]
    if others:
        ids = {one.record["id"] for one in sighted}
        others = [one for one in others if not one.is_blind and one.record["id"] in ids]
        ids = {one.record["id"] for one in others}
        sighted = [one for one in sighted if one.record["id"] in ids]
    means, other_means = mean_scores(sighted), mean_scores(others)
    blind = mean_scores(predictions, blind=True)
    return tuple(
        KindRow(
            kind=kind,
            items=mean.items,
            modular=mean.score,
            monolithic=other_means[kind].score if kind in other_means else None,
            blind=blind[kind].score if kind in blind else None,
        )
        for kind, mean in means.items()
    )


def _model_row(checkpoint: Path) -> ModelRow:
    config = read_config(checkpoint)
    groups = parameter_table(config).groups
    costs = prompt_costs(config, config.num_image_tokens_per_tile, TEXT_TOKENS)
    return ModelRow(
        parameters=groups.total,
        vision_parameters=groups.patch_embedding
        + groups.vision_tower
        + groups.projector
        + groups.visual_experts,
        prefill_flops=costs.prefill.total,
    )
