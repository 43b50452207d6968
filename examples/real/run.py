"""A real language model is given sight: data, start, four stages, evaluation, report, model card.

    python examples/real/run.py --size cpu --out runs/real

What is there already is skipped: a killed run goes on. The registries of npm and PyPI are needed
once; test pictures of Debian are left out where there is no apt.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from baselines import pixel_baselines
from card import WORDS, gallery, model_card
from measures import (
    best_of_candidates,
    english_perplexity,
    language_records,
    mean_losses,
    same_text_logits,
)
from recipe import SIZES
from records import HELD_OUT, SETTINGS, Size, make_data
from registries import Unreachable
from sources import LANGUAGE_MODEL

from mono_internvl.checkpoints.initialize import init
from mono_internvl.compute import ComputePlan, make_plan
from mono_internvl.errors import MonoInternVLError
from mono_internvl.evaluation.benchmark import Benchmark
from mono_internvl.evaluation.metrics import METRICS as METRICS_BY_NAME
from mono_internvl.evaluation.metrics import Metric
from mono_internvl.evaluation.protocol import Protocol
from mono_internvl.evaluation.questions import Question, first_of_each_kind
from mono_internvl.evaluation.runner import Subject, ask
from mono_internvl.reports.report import write_report
from mono_internvl.runs.folder import exclusive, resumable
from mono_internvl.runs.predictions import read_predictions
from mono_internvl.runs.provenance import origin
from mono_internvl.runs.schemas import START, RunMetrics, Score, StageResult, Target
from mono_internvl.training.estimate import estimate
from mono_internvl.training.loop import train_stage
from mono_internvl.training.recipe import Recipe, Rule, Stage
from mono_internvl.training.state import keep_plan

HERE = Path(__file__).parent
MEASURES, ROWS = "measures.json", "real.jsonl"
NAMING = ("noto", "noto-v1", "stamps", "clipart")
"""Kinds of held-out pictures of known things."""
DATA = {
    "quick": Size(variants=1, composed=40, held_out_composed=10),
    "cpu": Size(),
    "gpu": Size(names=560, variants=24, composed=40_000, px=224),
}
_PER_KIND = {"quick": 5, "cpu": None, "gpu": 600}


def _contains(text: str, truth: str) -> float:
    return float(any(word.lower() in text.lower() for word in truth.split("|")))


CONTAINS = Metric("contains", "answer", "text", lambda value: isinstance(value, str), _contains)
BENCHMARK = Benchmark(
    name="real",
    metrics={**METRICS_BY_NAME, CONTAINS.name: CONTAINS},
    protocols={"default": Protocol(max_new_tokens=24)},
)


@dataclass(frozen=True)
class Run:
    """One run and where its parts lie.

    Attributes:
        out: Its folder.
        cache: Of the packages.
        size: "quick", "cpu" or "gpu".
        is_full: Whether the language model is trained with the rest from the first stage on.
        compute: What it computes with.
    """

    out: Path
    cache: Path
    size: str
    is_full: bool
    compute: ComputePlan

    @property
    def recipe(self) -> Recipe:
        """The recipe of this size; with full tuning nothing is frozen."""
        recipe = SIZES[self.size]
        if not self.is_full:
            return recipe
        stages = [
            dataclasses.replace(s, rules=(s.rules[0], Rule(".*", s.rules[0].learning_rate)))
            for s in recipe.stages
        ]
        return dataclasses.replace(recipe, name=f"{recipe.name}-full", stages=tuple(stages))

    @property
    def data(self) -> Path:
        """Pictures and records."""
        return self.out / "data"

    @property
    def start(self) -> Path:
        """The checkpoint before training."""
        return self.out / START / "checkpoint"

    def answers(self, stage: str) -> Path:
        """File of a stage's answers."""
        return self.out / "predictions" / f"{stage}.jsonl"

    def settings(self) -> dict[str, Any]:
        """What the data folder says of itself."""
        found: dict[str, Any] = json.loads((self.data / SETTINGS).read_text())
        return found


def run(out: Path, cache: Path, size: str, device: str, is_full: bool) -> Path:
    """Do everything that is not done yet.

    Args:
        out: Folder of the run.
        cache: Folder of the packages.
        size: A name of `SIZES`.
        device: As `make_plan` takes it.
        is_full: Train the language model, too, from the first stage on.

    Returns:
        The report.

    Raises:
        Unreachable: A registry that is needed does not answer.
        MonoInternVLError: Training or evaluation refuses something; named.
    """
    began = time.perf_counter()
    with exclusive(out), resumable(out):
        plan = keep_plan(out, make_plan(device, "auto", processes=1), "auto")
        this = Run(out, cache, size, is_full, plan)
        print(plan.describe(), flush=True)
        counts = make_data(this.data, cache, DATA[size])
        print(f"data: {counts['s11']:,} training pictures, {counts['heldout']} held-out questions")
        if not this.start.exists():
            gguf = next(LANGUAGE_MODEL.fetch(cache).rglob("*.gguf"))
            init(
                str(gguf),
                this.start,
                visual_experts=("ffn", "qkv", "o"),
                chat_template=str(HERE / "chatml.jinja"),
                tile_px=DATA[size].px,
                max_tiles=1,
                image_attention="bidirectional",
                dtype="float32",
            )
        left = [s for s in this.recipe.stages if not (out / s.name / "checkpoint").exists()]
        if left:
            print(estimate(left, this.start, this.data, plan).describe(), flush=True)
        train_and_evaluate(this)
        metrics = collect(this, (time.perf_counter() - began) / 60)
        metrics.write(out)
        row = row_of(this, metrics)
        (out / ROWS).write_text(json.dumps(row) + "\n", encoding="utf-8")
        gallery(this.data, read_predictions(this.answers("s2"))).save(out / "gallery.png")
        last = out / this.recipe.stages[-1].name / "checkpoint"
        (last / "README.md").write_text(model_card(row), encoding="utf-8")
        return write_report(out, WORDS)


def train_and_evaluate(this: Run) -> None:
    """The stages in order, an evaluation before the first and after each."""
    questions = BENCHMARK.questions(this.data / HELD_OUT)
    language = this.out / "language.jsonl"
    language.write_text("".join(json.dumps(r) + "\n" for r in language_records()))
    most = _PER_KIND[this.size]
    questions = first_of_each_kind(questions, most)
    torch.set_num_threads(this.compute.threads)
    evaluate(this, START, this.start, questions, is_last=False)
    checkpoint = this.start
    for stage in this.recipe.stages:
        folder = this.out / stage.name
        checkpoint = train_stage(
            stage, checkpoint, this.data, folder, device=this.compute.device, plan=this.compute
        ).checkpoint
        is_last = stage is this.recipe.stages[-1]
        evaluate(this, stage.name, checkpoint, questions, is_last=is_last)


def evaluate(
    this: Run, name: str, checkpoint: Path, questions: Sequence[Question], is_last: bool
) -> None:
    """Answers and measures of a checkpoint; likelihoods of candidates after the last stage."""
    done = this.out / name / MEASURES
    if done.is_file():
        return
    subject = Subject.load(checkpoint, this.compute)
    naming = [question for question in questions if question.kind in NAMING]
    hidden = [question.without_images() for question in naming] if is_last else []
    text = BENCHMARK.questions(this.out / "language.jsonl")
    ask(subject, BENCHMARK, BENCHMARK.protocol, questions, hidden, text, out=this.answers(name))
    by_kind = {kind: [q for q in naming if q.kind == kind] for kind in NAMING}
    by_kind = {kind: found for kind, found in by_kind.items() if found}
    measures: dict[str, Any] = {
        "losses": {kind: mean_losses(subject, found) for kind, found in by_kind.items()},
        "perplexity": english_perplexity(subject),
        "text_logits_identical": same_text_logits(subject, this.start),
    }
    if is_last:
        names = this.settings()["names"]
        measures["of_20"] = {
            kind: best_of_candidates(subject, found, names) for kind, found in by_kind.items()
        }
        measures["pixels"] = _pixels(this, by_kind)
    done.write_text(json.dumps(measures, indent=1), encoding="utf-8")


def _pixels(this: Run, by_kind: dict[str, list[Question]]) -> dict[str, dict[str, float]]:
    """The pixel baselines, fitted to plain pictures, and to these and varied ones."""
    plain, varied = (
        [(r["image"], r["answer"]) for r in map(json.loads, (this.data / file).open())]
        for file in ("plain.jsonl", "s11.jsonl")
    )
    asked = {
        kind: [(str(q.record["image"]), str(q.record["answer"])) for q in found]
        for kind, found in by_kind.items()
    }
    return pixel_baselines(this.data, (plain, plain + varied[: 10 * len(plain)]), asked)


def collect(this: Run, minutes: float) -> RunMetrics:
    """Everything measured, from the files of a finished run."""
    stages: dict[str, Stage] = {stage.name: stage for stage in this.recipe.stages}
    results = [_result(this, name, stages.get(name)) for name in (START, *stages)]
    last = results[-1].scores
    pixels = _measures(this, this.recipe.stages[-1].name)["pixels"]
    targets = []
    for kind, least in (("noto", 0.80), ("stamps", 0.35)):
        if kind in last and this.size == "cpu":
            must = max(least, *pixels[kind].values()) if kind == "noto" else least
            value = last[kind].value or 0.0
            targets.append(Target(f"naming, {kind}", must, None, value, value >= must))
    spent = [result.cpu_minutes or 0.0 for result in results]
    return RunMetrics(
        name=this.recipe.name,
        is_quick=this.size == "quick",
        seed=0,
        cpu_minutes=sum(spent),
        minutes=minutes,
        targets=targets,
        stages=results,
        **origin(this.compute, BENCHMARK.protocol.planned(this.compute).to_dict()),
    )


def _result(this: Run, name: str, stage: Stage | None) -> StageResult:
    measures, predictions = _measures(this, name), read_predictions(this.answers(name))
    seen = BENCHMARK.mean_scores(p for p in predictions if not p.is_blind)
    blind = BENCHMARK.mean_scores(p for p in predictions if p.is_blind)
    names = len(this.settings()["names"])
    scores = {
        kind: Score(
            value=mean.score,
            blind=blind[kind].score if kind in blind else None,
            chance=1 / names if kind in NAMING else None,
            items=mean.items,
        )
        for kind, mean in seen.items()
        if kind != "language"
    }
    seconds = _training_seconds(this.out / name)
    return StageResult(
        name=name,
        title=stage.title if stage else "the language model with fresh visual parts",
        trains=", ".join(rule.pattern for rule in stage.rules if rule.learning_rate)
        if stage
        else "",
        steps=stage.steps if stage else None,
        samples=stage.steps * stage.batch_size if stage else None,
        cpu_minutes=seconds / 60 if stage else None,
        scores=scores,
        text={"perplexity": measures["perplexity"], "language": seen["language"].score},
        is_text_identical=measures["text_logits_identical"],
    )


def _measures(this: Run, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((this.out / name / MEASURES).read_text())
    return found


def _training_seconds(folder: Path) -> float:
    steps = folder / "metrics.jsonl"
    lines = steps.read_text().splitlines() if steps.is_file() else []
    return sum(float(json.loads(line)["seconds"]) for line in lines)


def row_of(this: Run, metrics: RunMetrics) -> dict[str, Any]:
    """The line of `results/real.jsonl`: figures alone, nothing of the pictures."""
    names = (START, *(stage.name for stage in this.recipe.stages))
    last = _measures(this, names[-1])
    return {
        "size": this.size,
        "variant": "full tuning" if this.is_full else "delta tuning",
        "stages": [stage.to_row() for stage in metrics.stages],
        "losses": {name: _measures(this, name)["losses"] for name in names},
        "of_20": last["of_20"],
        "pixels": last["pixels"],
        "targets": [target.to_row() for target in metrics.targets],
        "data": this.settings()["counts"],
        "left_out": this.settings()["left_out"],
        "minutes": metrics.minutes,
        **metrics.origin,
        "versions": dict(metrics.versions),
    }


def main() -> None:
    """Give SmolLM2-135M sight on pictures of the registries, and show what it sees."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--cache", type=Path, default=Path("runs/real-packages"))
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:N, ...")
    parser.add_argument("--full", action="store_true", help="train the language model, too")
    given = parser.parse_args()
    try:
        report = run(given.out, given.cache, given.size, given.device, given.full)
    except (MonoInternVLError, ValueError) as error:
        sys.exit(f"error: {error}")
    except Unreachable as error:
        if given.size != "quick":
            sys.exit(f"error: {error}")
        print(f"skipped: {error}")
        return
    print(f"report: {report}")


if __name__ == "__main__":
    main()
