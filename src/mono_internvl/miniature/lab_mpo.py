"""`mono-internvl lab mpo`: mixed preference optimisation on the miniature's own errors.

To new questions about pictures of the training split, the model after S2 draws answers; a right and
a wrong one are a pair. Then the same checkpoint learns from the pairs in two ways, in as many steps
at the same rates: by MPO, and by the next token of the chosen answers alone. Questions of all kinds
are asked before and after.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mono_internvl.compute import ComputePlan
from mono_internvl.data.sources import read_meta
from mono_internvl.evaluation.pairs import META, PairPlan, make_pairs
from mono_internvl.evaluation.protocol import Drawing
from mono_internvl.miniature.neighbours import (
    Ground,
    NeighbourRun,
    block_of,
    compared,
    measured,
    origins,
    run_seeds,
    verdict,
)
from mono_internvl.miniature.records import write_jsonl
from mono_internvl.miniature.scoring import BENCHMARK, PROTOCOL
from mono_internvl.miniature.stages import evaluation_records
from mono_internvl.runs.folder import begin, write_whole
from mono_internvl.runs.json_lines import read_lines
from mono_internvl.runs.provenance import origin
from mono_internvl.runs.schemas import add_cost, cpu_minutes
from mono_internvl.training.loop import train_stage
from mono_internvl.training.objectives.mpo import MPO
from mono_internvl.training.objectives.next_token import NextToken
from mono_internvl.training.objectives.objective import Objective
from mono_internvl.training.recipe import Rule, Stage

RUNS = "mpo.jsonl"
BEFORE, PREFERRED, CHOSEN = "before", "mpo", "chosen"
TITLES = {
    BEFORE: "after S2",
    PREFERRED: "MPO",
    CHOSEN: "next token of the chosen answers",
}
_OBJECTIVES: Mapping[str, Objective] = {PREFERRED: MPO(), CHOSEN: NextToken()}
_RATE = 1e-5


@dataclass(frozen=True)
class Sizes:
    """Of the lab.

    Attributes:
        per_kind: New questions of each kind.
        samples: Answers that are drawn to each.
        per_question: Most pairs of a question.
        steps: Of training, of 16 pairs each.
        heldout: Held-out questions of each kind.
    """

    per_kind: int = 250
    samples: int = 8
    per_question: int = 4
    steps: int = 300
    heldout: int = 150


FULL, QUICK = Sizes(), Sizes(per_kind=8, samples=4, steps=6, heldout=4)


def stage_of(name: str, sizes: Sizes, seed: int) -> Stage:
    """How a variant learns from the pairs.

    Args:
        name: Of the variant.
        sizes: Of the lab.
        seed: Of the order of the pairs.
    """
    return Stage(
        name=name,
        title=TITLES[name],
        data=META,
        rules=(Rule(".*", _RATE),),
        objective=_OBJECTIVES[name],
        loss_weighting="sample",
        steps=sizes.steps,
        batch_size=16,
        schedule="cosine",
        warmup_ratio=0.03,
        weight_decay=0.05,
        betas=(0.9, 0.95),
        max_tokens=320,
        max_tiles=1,
        checkpoint_every=50,
        seed=seed,
    )


def compare_preferences(quickstarts: Sequence[Path], run: Path, **options: Any) -> Path:
    """Make pairs, learn from them, and score; options as of `run_seeds`.

    Returns:
        The table.

    Raises:
        SampleError: No pair was found.
    """
    return run_seeds(quickstarts, run, RUNS, _run, mpo_page, **options)


def _run(ground: Ground, folder: Path, quick: bool, plan: ComputePlan) -> None:
    """One seed: questions, pairs, two ways to learn, three times the held-out questions."""
    sizes, began = QUICK if quick else FULL, time.process_time()
    folder.mkdir(parents=True, exist_ok=True)
    begin(folder / "begun.json", {"quickstart": str(ground.folder.resolve())})
    questions = folder / "data" / "questions.jsonl"
    if not questions.exists():
        drawn = evaluation_records(questions.parent, "train", sizes.per_kind, 0, ground.seed)
        partial = questions.with_suffix(".partial")
        write_jsonl(partial, "question", (r for r in drawn if r["kind"] != "novel"))
        partial.rename(questions)
    pair_plan = PairPlan(sizes.samples, sizes.per_question, drawing=Drawing(temperature=1.0))
    counts = make_pairs(
        ground.checkpoint,
        questions,
        folder / "pairs",
        benchmark=BENCHMARK,
        protocol=PROTOCOL.planned(plan),
        plan=pair_plan,
        device="cpu",
        threads=plan.threads,
    )
    checkpoints = {BEFORE: ground.checkpoint}
    for name in _OBJECTIVES:
        stage = stage_of(name, sizes, ground.seed)
        result = train_stage(stage, ground.checkpoint, folder / "pairs", folder / name, plan=plan)
        checkpoints[name] = result.checkpoint
    scores = {
        name: measured(
            checkpoint, ground, plan, sizes.heldout, folder / "answers" / f"{name}.jsonl"
        )
        for name, checkpoint in checkpoints.items()
    }
    last = json.loads(read_lines(folder / PREFERRED / "metrics.jsonl")[-1])
    add_cost(folder / "cost.json", "all", time.process_time() - began)
    row = NeighbourRun(
        seed=ground.seed,
        quick=quick,
        cpu_minutes=cpu_minutes(folder),
        scores=scores,
        facts={
            "questions": counts.questions,
            "right": counts.right,
            "wrong": counts.wrong,
            "pairs": sum(len(source) for source in read_meta(folder / "pairs" / META)),
            "steps": sizes.steps,
            "ranked": last["ranked"],
            "shift": last["shift"],
        },
        **origin(plan, PROTOCOL.planned(plan).to_dict()),
    )
    write_whole(folder / "row.json", json.dumps(dataclasses.asdict(row)))


def mpo_page(runs: Sequence[NeighbourRun]) -> str:
    """Markdown: scores before and after, what the pairs were, and the verdict."""
    pairs = ", ".join(f"{run.facts['pairs']:,.0f}" for run in runs)
    errors = ", ".join(
        f"{run.facts['wrong'] / (run.facts['right'] + run.facts['wrong']):.1%}" for run in runs
    )
    ranked = ", ".join(f"{run.facts['ranked']:.2f}" for run in runs)
    facts = runs[0].facts
    return "\n".join(
        [
            *compared(runs, TITLES),
            "",
            f"Of the answers drawn to {facts['questions']:,.0f} new questions {errors} were wrong: "
            f"{pairs} pairs, {facts['steps']:.0f} steps of 16. In the last step MPO ranked "
            f"{ranked} of the pairs right.",
            "",
            f"- MPO against the model after S2: {verdict(runs, PREFERRED, BEFORE)}.",
            f"- MPO against the next token of the same answers: {verdict(runs, PREFERRED, CHOSEN)}."
            "",
            "",
            origins(runs),
        ]
    )


mpo_block = block_of(RUNS, mpo_page)
"""Fills a page with the committed rows."""
