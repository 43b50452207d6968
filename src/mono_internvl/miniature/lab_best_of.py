"""`mono-internvl lab best-of`: a critic of steps against a vote, in the miniature.

The model after S2 learns to answer two kinds of questions in steps. A critic learns from its
answers to other questions, judged by going on from every step. Then it draws sixteen answers to
held-out questions, and one of the first N is chosen: by the critic, by a vote, by chance.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mono_internvl.compute import ComputePlan
from mono_internvl.evaluation.answer_formats import FORMATS
from mono_internvl.evaluation.benchmarks.records import RECORDS
from mono_internvl.evaluation.best_of import (
    ANY,
    CRITIC,
    GREEDY,
    RANDOM,
    VOTE,
    critic_scores,
    means_of,
)
from mono_internvl.evaluation.critic import Critic
from mono_internvl.evaluation.drawing import draw_answers
from mono_internvl.evaluation.pairs import META
from mono_internvl.evaluation.protocol import Drawing, Protocol
from mono_internvl.evaluation.runner import Subject
from mono_internvl.evaluation.step_data import StepPlan, make_steps
from mono_internvl.miniature.lab_pages import Figure
from mono_internvl.miniature.neighbours import (
    MEAN,
    Ground,
    NeighbourRun,
    block_of,
    origins,
    run_seeds,
    verdict,
)
from mono_internvl.miniature.records import Dataset, write_jsonl, write_meta
from mono_internvl.miniature.step_tasks import step_records
from mono_internvl.reports.markdown import head, line
from mono_internvl.runs.folder import begin, write_whole
from mono_internvl.runs.provenance import origin
from mono_internvl.runs.schemas import add_cost, cpu_minutes
from mono_internvl.training.loop import train_stage
from mono_internvl.training.recipe import Rule, Stage

RUNS = "best-of.jsonl"
COUNTS = (1, 2, 4, 8, 16)
AT = 8
"""Of the counts, what the verdicts are about, as InternVL3's are."""
FORMAT = FORMATS["marked"]
PROTOCOL = Protocol(max_new_tokens=48)
DRAWING = Drawing(temperature=1.0, greedy_first=True)
"""Warmer than at full scale: a model of this size is sure of its one-digit answers."""
_TITLES = {GREEDY: "greedy", RANDOM: "by chance", VOTE: "vote", CRITIC: "critic", ANY: "any right"}


@dataclass(frozen=True)
class Sizes:
    """Of the lab.

    Attributes:
        train: Records of each kind that the model learns from.
        policy_steps: Of that training, of 16 records each.
        judged: Questions of each kind whose answers are judged for the critic.
        continuations: From each step.
        critic_steps: Of the critic's training, of 16 chats each.
        heldout: Held-out questions of each kind.
    """

    train: int = 1500
    policy_steps: int = 500
    judged: int = 150
    continuations: int = 8
    critic_steps: int = 250
    heldout: int = 150


FULL = Sizes()
QUICK = Sizes(train=8, policy_steps=3, judged=2, continuations=2, critic_steps=2, heldout=2)


def stage_of(name: str, steps: int, seed: int) -> Stage:
    """How the model learns to answer in steps, and how the critic learns to judge them."""
    return Stage(
        name=name,
        title="answers in steps" if name == "policy" else "a critic of steps",
        data="policy.json" if name == "policy" else META,
        rules=(Rule(".*", 3e-4),),
        steps=steps,
        batch_size=16,
        schedule="cosine",
        warmup_ratio=0.05,
        weight_decay=0.05,
        betas=(0.9, 0.95),
        max_tokens=768,
        max_tiles=1,
        checkpoint_every=100,
        seed=seed,
    )


def compare_choices(quickstarts: Sequence[Path], run: Path, **options: Any) -> Path:
    """Train answers in steps and a critic, draw, choose and score; options as of `run_seeds`.

    Returns:
        The table.
    """
    return run_seeds(quickstarts, run, RUNS, _run, best_of_page, **options)


def _run(ground: Ground, folder: Path, quick: bool, plan: ComputePlan) -> None:
    """One seed: data, a model that answers in steps, its critic, the choice."""
    sizes, began = QUICK if quick else FULL, time.process_time()
    folder.mkdir(parents=True, exist_ok=True)
    begin(folder / "begun.json", {"quickstart": str(ground.folder.resolve())})
    data = folder / "data"
    if not (data / "done").exists():
        _write_data(data, sizes, ground.seed)
    stage = stage_of("policy", sizes.policy_steps, ground.seed)
    policy = train_stage(stage, ground.checkpoint, data, folder / "policy", plan=plan).checkpoint
    protocol = PROTOCOL.planned(plan)
    counts = make_steps(
        policy,
        data / "judged.jsonl",
        folder / "judged",
        benchmark=RECORDS,
        protocol=protocol,
        plan=StepPlan(continuations=sizes.continuations, format=FORMAT.name),
        device="cpu",
        threads=plan.threads,
    )
    stage = stage_of("critic", sizes.critic_steps, ground.seed)
    critic = train_stage(stage, policy, folder / "judged", folder / "critic", plan=plan).checkpoint
    asked, drawn_by = FORMAT.of(RECORDS), protocol.drawn(DRAWING)
    questions = asked.questions(data / "heldout.jsonl")
    answers = draw_answers(
        Subject.load(policy, plan),
        asked,
        drawn_by,
        questions,
        max(COUNTS),
        folder / "answers.jsonl",
    )
    judge = Critic(Subject.load(critic, plan))
    steps = critic_scores(judge, asked, drawn_by, questions, answers, folder / "critic.jsonl")
    scores = {}
    for count in COUNTS:
        means, _ = means_of(asked, questions, answers, steps, FORMAT, count)
        for way, kinds in means.items():
            found = {kind: Figure(score, sizes.heldout) for kind, score in kinds.items()}
            found[MEAN] = Figure(fmean(kinds.values()), len(questions))
            scores[f"{way}@{count}"] = found
    add_cost(folder / "cost.json", "all", time.process_time() - began)
    row = NeighbourRun(
        seed=ground.seed,
        quick=quick,
        cpu_minutes=cpu_minutes(folder),
        scores=scores,
        facts={
            "chats": counts.answers,
            "steps": counts.steps,
            "good": counts.good,
            "continuations": sizes.continuations,
        },
        **origin(plan, drawn_by.to_dict()),
    )
    write_whole(folder / "row.json", json.dumps(dataclasses.asdict(row)))


def _write_data(data: Path, sizes: Sizes, seed: int) -> None:
    """What the model learns from, what the critic's answers are drawn to, what is reported."""
    train = step_records(data, "policy", "train", sizes.train, seed)
    write_meta(data, "policy", [Dataset("steps", train)])
    judged = step_records(data, "judged", "train", sizes.judged, seed)
    write_jsonl(data / "judged.jsonl", "judged", judged)
    heldout = step_records(data, "heldout", "heldout", sizes.heldout, seed)
    write_jsonl(data / "heldout.jsonl", "heldout", heldout)
    (data / "done").touch()


def best_of_page(runs: Sequence[NeighbourRun]) -> str:
    """Markdown: the score of each way to choose among N answers, by N, and the verdicts."""
    ways = [way for way in _TITLES if f"{way}@{AT}" in runs[0].scores]
    items = runs[0].scores[f"{GREEDY}@{AT}"][MEAN].items
    lines = head([f"N, of {items} questions", *(_TITLES[way] for way in ways)])
    for count in COUNTS:
        cells = []
        for way in ways:
            values = [run.scores[f"{way}@{count}"][MEAN].value for run in runs]
            each = ", ".join(f"{value:.3f}" for value in values)
            cells.append(f"{fmean(values):.3f} ({each})" if len(values) > 1 else each)
        lines.append(line([str(count), *cells]))
    said = ", ".join(
        f"{run.facts['chats']:,.0f} chats with {run.facts['good'] / run.facts['steps']:.0%} of "
        f"{run.facts['steps']:,.0f} steps +"
        for run in runs
    )
    critic = f"{CRITIC}@{AT}"
    return "\n".join(
        [
            *lines,
            "",
            f"The critic learnt from {said}; {runs[0].facts['continuations']:.0f} continuations "
            "from each step.",
            "",
            f"- N = {AT}, the critic against the vote: {verdict(runs, critic, f'{VOTE}@{AT}')}.",
            f"- N = {AT}, the critic against one greedy answer: "
            f"{verdict(runs, critic, f'{GREEDY}@{AT}')}.",
            f"- N = {AT}, the vote against one greedy answer: "
            f"{verdict(runs, f'{VOTE}@{AT}', f'{GREEDY}@{AT}')}.",
            "",
            origins(runs),
        ]
    )


best_of_block = block_of(RUNS, best_of_page)
"""Fills a page with the committed rows."""
