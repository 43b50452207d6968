"""`mono-internvl lab video`: questions about made-up clips, with frames, a single one, and none.

The quickstart's model learns from clips twice, in as many steps: with four frames of each, and with
the middle one alone. Held-out clips are asked about with what was learnt from; and blind, with the
four frames hidden, which tells what questions give away.
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
from mono_internvl.evaluation.benchmarks.records import RECORDS
from mono_internvl.evaluation.runner import Subject, ask
from mono_internvl.miniature.clips import clip_records
from mono_internvl.miniature.lab_pages import Figure
from mono_internvl.miniature.neighbours import (
    MEAN,
    Ground,
    NeighbourRun,
    block_of,
    compared,
    origins,
    run_seeds,
    verdict,
)
from mono_internvl.miniature.recipes import MINIATURE
from mono_internvl.miniature.records import write_jsonl
from mono_internvl.miniature.scoring import PROTOCOL
from mono_internvl.runs.folder import write_whole
from mono_internvl.runs.provenance import origin
from mono_internvl.runs.schemas import add_cost, cpu_minutes
from mono_internvl.training.loop import train_stage
from mono_internvl.training.recipe import Stage

RUNS = "video.jsonl"
BLIND, SINGLE, FRAMES = "blind", "single", "frames"
TITLES = {BLIND: "blind", SINGLE: "one frame", FRAMES: "four frames"}
COUNTS = {SINGLE: 1, FRAMES: 4}
"""Frames of a clip, by who learns from them."""


@dataclass(frozen=True)
class Sizes:
    """Of the lab.

    Attributes:
        clips: To learn from.
        heldout: To be asked about.
        steps: Of training, of eight questions each.
    """

    clips: int = 1500
    heldout: int = 240
    steps: int = 600


FULL, QUICK = Sizes(), Sizes(clips=12, heldout=6, steps=4)


def compare_frames(quickstarts: Sequence[Path], run: Path, **options: Any) -> Path:
    """Learn from clips and ask about others; `run_seeds` has the options.

    Returns:
        The table.
    """
    return run_seeds(quickstarts, run, RUNS, _run, frames_page, **options)


def stage_of(name: str, sizes: Sizes, seed: int) -> Stage:
    """How a variant learns: as in the miniature's instruction tuning."""
    return dataclasses.replace(
        MINIATURE.stages[-1],
        name=name,
        title=f"clips, {TITLES[name]}",
        data=f"{name}.json",
        steps=sizes.steps,
        warmup_steps=min(50, sizes.steps // 2),
        max_tokens=400,
        checkpoint_every=200,
        seed=seed,
    )


def _run(ground: Ground, folder: Path, quick: bool, plan: ComputePlan) -> None:
    sizes, began = QUICK if quick else FULL, time.process_time()
    data = folder / "data"
    if not (data / "done").exists():
        _write_data(data, sizes, ground.seed)
    scores: dict[str, dict[str, Figure]] = {}
    for name in COUNTS:
        stage = stage_of(name, sizes, ground.seed)
        trained = train_stage(stage, ground.checkpoint, data, folder / name, plan=plan)
        subject = Subject.load(trained.checkpoint, plan)
        questions = RECORDS.questions(data / f"{name}-heldout.jsonl")
        asked = {name: questions}
        if name == FRAMES:
            asked[BLIND] = [question.without_images() for question in questions]
        for label, some in asked.items():
            answers = ask(subject, RECORDS, PROTOCOL, some, out=folder / f"{label}.jsonl")
            means = RECORDS.mean_scores(answers)
            found = {kind: Figure(mean.score, mean.items) for kind, mean in means.items()}
            found[MEAN] = Figure(fmean(one.value for one in found.values()), len(answers))
            scores[label] = found
    add_cost(folder / "cost.json", "all", time.process_time() - began)
    row = NeighbourRun(
        seed=ground.seed,
        quick=quick,
        cpu_minutes=cpu_minutes(folder),
        scores={name: scores[name] for name in TITLES},
        facts={"clips": sizes.clips, "steps": sizes.steps},
        **origin(plan, PROTOCOL.planned(plan).to_dict()),
    )
    write_whole(folder / "row.json", json.dumps(dataclasses.asdict(row)))


def _write_data(data: Path, sizes: Sizes, seed: int) -> None:
    """Clips, and for each variant its records: the same but for the number of frames."""
    for split, count in (("train", sizes.clips), ("heldout", sizes.heldout)):
        records = list(clip_records(data, split, count, seed))
        for name, frames in COUNTS.items():
            file = data / f"{name}-{split}.jsonl"
            write_jsonl(file, name, ({**record, "frames": frames} for record in records))
    for name in COUNTS:
        meta = {name: {"root": ".", "annotation": f"{name}-train.jsonl", "repeat_time": 1}}
        (data / f"{name}.json").write_text(json.dumps(meta), encoding="utf-8")
    write_whole(data / "done", "")


def frames_page(runs: Sequence[NeighbourRun]) -> str:
    """Markdown: scores of each kind, and the verdicts."""
    facts = runs[0].facts
    return "\n".join(
        [
            *compared(runs, TITLES),
            "",
            f"Learnt from {facts['clips']:,.0f} clips in {facts['steps']:,.0f} steps of eight "
            "questions. A guess is right in a half of `moved` and `first` and in a quarter of "
            "`where`.",
            "",
            f"- Four frames against blind: {verdict(runs, FRAMES, BLIND)}.",
            f"- Four frames against the middle one: {verdict(runs, FRAMES, SINGLE)}.",
            "",
            origins(runs),
        ]
    )


frames_block = block_of(RUNS, frames_page)
"""The committed rows of `lab video`."""
