"""The main job: a small language model learns to see, in the paper's four stages, on a CPU.

Data, starting model, four stages, an evaluation after each, `metrics.json`, `report.html`, and
three questions answered on the screen. What is there already is skipped: a killed run goes on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mono_internvl import miniature
from mono_internvl.checkpoints.loading import load_planned
from mono_internvl.compute import ComputePlan, make_plan
from mono_internvl.evaluation.runner import (
    Question,
    answer_all,
    perplexity,
    read_questions,
    write_predictions,
)
from mono_internvl.miniature import WorldFiles, WorldSize
from mono_internvl.miniature.english import ASSETS
from mono_internvl.miniature.language_model import give_eyes, make_language_model
from mono_internvl.miniature.recipes import (
    LANGUAGE,
    MINIATURE,
    QUICK_LANGUAGE,
    QUICK_MINIATURE,
    seeded,
)
from mono_internvl.miniature.targets import (
    CHANCE,
    FULL_BOUNDS,
    QUICK_BOUNDS,
    Bound,
    bounds_in,
    judge,
    mean_scores,
    to_rows,
)
from mono_internvl.miniature.text_tasks import english_records
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.reports.report import write_report
from mono_internvl.runs.folder import begin, exclusive, resumable, write_whole
from mono_internvl.runs.json_lines import read_lines
from mono_internvl.runs.provenance import origin
from mono_internvl.serving.loading import load
from mono_internvl.training.distributed import barrier, rank, run_processes, world_size
from mono_internvl.training.estimate import Estimate, estimate, in_minutes
from mono_internvl.training.loop import train_stage
from mono_internvl.training.recipe import Recipe, Stage
from mono_internvl.training.state import keep_plan

SHIPPED_LANGUAGE_MODEL = ASSETS / "language_model"
START = "start"
SETTINGS, METRICS = "quickstart.json", "metrics.json"
TEXT_KINDS = ("name_qa", "fact_cloze", "reading_qa", "copying", "lookup")
LONGEST_ANSWER = 64  # tokens; a caption of three things has about 40


@dataclass(frozen=True)
class Plan:
    """Sizes of a quickstart.

    Attributes:
        size: Of the world.
        recipe: The four stages.
        language: The language model's recipe, for `--llm scratch`.
        bounds: What has to be reached.
        per_kind: Held-out records of a kind after the last stage; None is all.
        per_kind_between: The same after the other stages.
        per_kind_blind: The same without the image, after the other stages.
        per_kind_blind_last: The same after the last stage; None is all.
        text_per_kind: Text probes of a kind.
        english_records: Held-out English for the perplexity.
    """

    size: WorldSize
    recipe: Recipe
    language: Recipe
    bounds: dict[str, Bound] = field(default_factory=dict)
    per_kind: int | None = None
    per_kind_between: int = 60
    per_kind_blind: int = 60
    per_kind_blind_last: int | None = 150
    text_per_kind: int = 120
    english_records: int = 150


FULL = Plan(miniature.FULL, MINIATURE, LANGUAGE, FULL_BOUNDS)
QUICK = Plan(
    miniature.QUICK,
    QUICK_MINIATURE,
    QUICK_LANGUAGE,
    QUICK_BOUNDS,
    per_kind=20,
    per_kind_between=8,
    per_kind_blind=8,
    per_kind_blind_last=20,
    text_per_kind=24,
    english_records=30,
)


def quickstart(
    run: Path = Path("runs/quickstart"),
    *,
    quick: bool = False,
    processes: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    precision: str = "auto",
    attention: str | None = None,
    llm: str = "shipped",
    seed: int = 0,
    ask: bool = True,
) -> Path:
    """Give a small language model eyes and show what it learnt.

    Args:
        run: Output folder; a second call with the same arguments goes on where the first stopped.
        quick: The same path with smaller numbers, for a check of two or three minutes.
        processes: That share each batch; as many as the machine has cores for unless given.
        threads: Of each process; the cores left to each unless given.
        device: Of training and evaluation.
        precision: "auto", "bf16" or "fp32"; a run that goes on keeps what it began with.
        attention: Attention implementation; the plan's unless given.
        llm: "shipped", "scratch" (train it anew) or the folder of a language model of a known
            family whose tokenizer has the control tokens of the released prompts.
        seed: Of the world, of the order of its data and of the first weights of patch embedding and
            projector.
        ask: Answer three questions on the screen at the end.

    Returns:
        The report.
    """
    plan = QUICK if quick else FULL
    plan = dataclasses.replace(plan, recipe=seeded(plan.recipe, seed))
    compute = make_plan(
        device,
        precision,
        attention=attention,
        threads=threads,
        processes=processes,
        batch_size=math.gcd(*(stage.batch_size for stage in plan.recipe.stages)),
    )
    console, began = Console(highlight=False), time.perf_counter()
    with exclusive(run), resumable(run):
        begin(run / SETTINGS, {"quick": quick, "llm": llm, "seed": seed})
        compute = keep_plan(run, compute, precision)
        console.print(compute.describe(), markup=False, soft_wrap=True)
        console.print("[bold]1/5[/] the world: pictures, captions, questions", soft_wrap=True)
        with _Cost(run / START, "rendered"):
            world = miniature.write_world(run / "data", plan.size, seed)
        console.print("[bold]2/5[/] the language model that gets eyes", soft_wrap=True)
        if not (run / START / "checkpoint").exists():
            _make_start(llm, world, run, plan, compute, seed)
        console.print("[bold]3/5[/] four stages, an evaluation after each", soft_wrap=True)
        expected = _estimate(console, plan, world, run, compute)
        arguments = (plan, world, run, compute, expected)
        run_processes(train_and_evaluate, compute.processes, *arguments, threads=compute.threads)
        console.print("[bold]4/5[/] the report", soft_wrap=True)
        metrics = collect(run, plan, quick, compute, time.perf_counter() - began)
        metrics["seed"] = seed
        write_whole(run / METRICS, json.dumps(metrics, indent=2))
        last = run / plan.recipe.stages[-1].name / "checkpoint"
        shutil.copytree(last, run / "model", dirs_exist_ok=True)
        report = write_report(run)
        _show_targets(console, metrics, llm)
        if ask:
            console.print("[bold]5/5[/] three questions", soft_wrap=True)
            _ask_three(console, run, world)
        console.print(f"report: {report}", soft_wrap=True)
        return report


def _make_start(
    llm: str, world: WorldFiles, run: Path, plan: Plan, compute: ComputePlan, seed: int
) -> None:
    if llm == "scratch":
        folder = make_language_model(world, run / "language", recipe=plan.language, compute=compute)
    else:
        folder = SHIPPED_LANGUAGE_MODEL if llm == "shipped" else Path(llm)
    give_eyes(folder, run / START / "checkpoint", seed=seed)


def _estimate(
    console: Console, plan: Plan, world: WorldFiles, run: Path, compute: ComputePlan
) -> Estimate | None:
    """What the stages that are left will take, said before they begin."""
    left = [s for s in plan.recipe.stages if not (run / s.name / "checkpoint").exists()]
    if not left:
        return None
    torch.set_num_threads(compute.threads)
    with _Cost(run / START, "estimated"):
        expected = estimate(left, run / START / "checkpoint", world.root, compute)
    console.print(expected.describe(), soft_wrap=True)
    return expected


def train_and_evaluate(
    plan: Plan,
    world: WorldFiles,
    run: Path,
    compute: ComputePlan,
    expected: Estimate | None = None,
) -> None:
    """In every process: the stages in order, an evaluation before the first and after each.

    Args:
        plan: What to do.
        world: Its data.
        run: Output folder.
        compute: What to compute with.
        expected: Of the stages that are left; what remains of it is said before each of them.
    """
    # Alone, this is the process that rendered, and its time until here is counted.
    with _Cost(run / START, "set up", from_process_start=world_size() > 1):
        checkpoint = run / START / "checkpoint"
    _evaluate(START, checkpoint, plan, world, run, compute, is_last=False)
    done: list[str] = []
    took_s = 0.0
    for stage in plan.recipe.stages:
        began = time.perf_counter()
        if expected is not None and stage.name in expected.seconds and rank() == 0:
            left = in_minutes(expected.seconds_left(done, took_s))
            Console(highlight=False).print(f"{stage.name}: {left} left in all", soft_wrap=True)
        with _Cost(run / stage.name, "trained"):
            result = train_stage(
                stage,
                checkpoint,
                world.root,
                run / stage.name,
                device=compute.device,
                plan=compute,
            )
        checkpoint = result.checkpoint
        is_last = stage is plan.recipe.stages[-1]
        _evaluate(stage.name, checkpoint, plan, world, run, compute, is_last=is_last)
        if result.resumed_at == 0:
            done.append(stage.name)
            took_s += time.perf_counter() - began


def _evaluate(
    name: str,
    checkpoint: Path,
    plan: Plan,
    world: WorldFiles,
    run: Path,
    compute: ComputePlan,
    is_last: bool,
) -> None:
    """Answers and text measures of one checkpoint, shared out over the processes."""
    done = run / name / "text.json"
    if done.exists():
        return
    with _Cost(run / name, "evaluated"):
        model = load_planned(checkpoint, compute, autocasts=True)
        processor = MonoInternVLProcessor.from_pretrained(checkpoint)
        sighted = read_questions(
            world.heldout, per_kind=plan.per_kind if is_last else plan.per_kind_between
        )
        blind = read_questions(
            world.heldout, per_kind=plan.per_kind_blind_last if is_last else plan.per_kind_blind
        )
        if not is_last:
            sighted = [q for q in sighted if not q.record.get("aligned")]
        text = read_questions(world.probes_heldout, per_kind=plan.text_per_kind)
        answer = partial(
            answer_all,
            model,
            processor,
            max_new_tokens=LONGEST_ANSWER,
            precision=compute.precision,
        )
        found = answer(_share(sighted)) + answer(_share(blind), blind=True) + answer(_share(text))
        write_predictions(run / name / f"predictions.{rank()}.jsonl", found)
        barrier()
        if rank() == 0:
            parts = [run / name / f"predictions.{i}.jsonl" for i in range(world_size())]
            merged = run / "predictions" / f"{name}.jsonl"
            merged.parent.mkdir(exist_ok=True)
            write_whole(merged, "".join(part.read_text() for part in parts).rstrip("\n"))
            for part in parts:
                part.unlink()
            measures = {
                "perplexity": perplexity(model, processor, _english(world, plan.english_records)),
                "logits_identical": _same_text_logits(model, processor, run, text),
            }
            write_whole(done, json.dumps(measures))
        barrier()


def _share(questions: Sequence[Question]) -> list[Question]:
    """This process's share, dealt out in turn."""
    return list(questions[rank() :: world_size()])


def _english(world: WorldFiles, count: int) -> list[list[dict[str, Any]]]:
    paragraphs = [p for p in world.english_heldout.read_text().split("\n\n") if p.strip()]
    roles = {"human": "user", "gpt": "assistant"}
    return [
        [{"role": roles[t["from"]], "content": t["value"]} for t in record["conversations"]]  # type: ignore[attr-defined]
        for record in english_records(paragraphs)[:count]
    ]


@torch.inference_mode()
def _same_text_logits(
    model: MonoInternVLForConditionalGeneration,
    processor: MonoInternVLProcessor,
    run: Path,
    questions: Sequence[Question],
) -> bool:
    """Whether text-only logits equal, bit for bit, those of the model before the first stage."""
    before: MonoInternVLForConditionalGeneration = (
        MonoInternVLForConditionalGeneration.from_pretrained(
            run / START / "checkpoint",
            dtype=torch.float32,
            attn_implementation=model.config.get_text_config()._attn_implementation,
        )
    )
    before.to(model.device).eval()
    model.eval()
    for question in questions[:: max(1, len(questions) // 16)]:
        ids = processor.encode_conversation(question.sample.turns).input_ids[None].to(model.device)
        if not torch.equal(model(ids).logits, before(ids).logits):
            return False
    return True


class _Cost:
    """CPU seconds of a phase of this process, kept in a file and added up over interrupted runs."""

    def __init__(self, folder: Path, phase: str, from_process_start: bool = False):
        self.file = folder / (f"cost.{rank()}.json" if world_size() > 1 else "cost.json")
        self.key, self.from_process_start = phase, from_process_start

    def __enter__(self) -> None:
        self.began = 0.0 if self.from_process_start else time.process_time()

    def __exit__(self, *exception: object) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        costs = json.loads(self.file.read_text()) if self.file.exists() else {}
        costs[self.key] = costs.get(self.key, 0.0) + time.process_time() - self.began
        write_whole(self.file, json.dumps(costs))


def collect(
    run: Path, plan: Plan, quick: bool, compute: ComputePlan, seconds: float
) -> dict[str, Any]:
    """Everything that was measured, from the files of a finished run: `metrics.json`."""
    names = (START, *(stage.name for stage in plan.recipe.stages))
    rows = {name: read_rows(run / "predictions" / f"{name}.jsonl") for name in names}
    text = {name: json.loads((run / name / "text.json").read_text()) for name in names}
    costs = {name: _cpu_minutes(run / name) for name in names}
    cpu_minutes = sum(costs.values())
    targets = judge(
        bounds_in(compute.precision, plan.bounds),
        rows,
        {name: text[name]["perplexity"] for name in names},
        {name: text[name]["logits_identical"] for name in names},
        cpu_minutes,
    )
    stages: dict[str, Stage] = {stage.name: stage for stage in plan.recipe.stages}
    return {
        "name": "quickstart",
        "quick": quick,
        "cpu_minutes": cpu_minutes,
        "minutes": seconds / 60,
        **origin(compute),
        "targets": to_rows(targets),
        "stages": [
            _stage_row(name, stages.get(name), rows[name], text[name], costs[name])
            for name in names
        ],
    }


def _stage_row(
    name: str,
    stage: Stage | None,
    rows: list[dict[str, Any]],
    text: dict[str, Any],
    cpu_minutes: float,
) -> dict[str, Any]:
    sighted, blind = mean_scores(rows), mean_scores(rows, blind=True)
    items = [row["kind"] for row in rows if not row["blind"] and not row.get("aligned")]
    said = {kind: value for kind, value in sighted.items() if kind.startswith("facts_")}
    said |= {kind: sighted[kind] for kind in TEXT_KINDS if kind in sighted}
    aligned = mean_scores([{**row, "aligned": False} for row in rows if row.get("aligned")])
    return {
        "name": name,
        "title": stage.title if stage else "before the first stage",
        "steps": stage.steps if stage else 0,
        "samples": stage.steps * stage.batch_size if stage else 0,
        "cpu_minutes": cpu_minutes,
        "trains": _trains(stage),
        "scores": {
            kind: {
                "score": value,
                "blind": blind.get(kind),
                "chance": CHANCE.get(kind),
                "items": items.count(kind),
                "aligned": aligned.get(kind),
            }
            for kind, value in sighted.items()
            if kind not in TEXT_KINDS and not kind.startswith("facts_")
        },
        "text": {"perplexity": text["perplexity"], **said},
        "text_logits_identical": text["logits_identical"],
    }


def _trains(stage: Stage | None) -> str:
    if stage is None:
        return "nothing"
    learned = [rule for rule in stage.rules if rule.learning_rate is not None]
    return ", ".join(f"{rule.pattern} at {rule.learning_rate:g}" for rule in learned)


def _cpu_minutes(folder: Path) -> float:
    files = folder.glob("cost*.json")
    return sum(sum(json.loads(file.read_text()).values()) for file in files) / 60


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The predictions in a file, as they are written."""
    return [json.loads(line) for line in read_lines(file)]


def _show_targets(console: Console, metrics: dict[str, Any], llm: str) -> None:
    for target in metrics["targets"]:
        value = "-" if target["value"] is None else f"{target['value']:.2f}"
        sign = ">=" if target["better"] == "higher" else "<="
        bound = f"must be {sign} {target['must']:g}" if target["must"] is not None else "reported"
        mark = "[green]ok[/]" if target["met"] else "[red]missed[/]"
        if target["value"] is None:
            mark = "[yellow]not measured[/]"
        console.print(f"  {target['name']:<55} {value:>7}  ({bound}) {mark}", soft_wrap=True)
    if llm not in ("shipped", "scratch"):
        console.print(
            "  The bounds were chosen for the shipped language model. What another one keeps is "
            "not measured where it knew nothing before the first stage.",
            soft_wrap=True,
        )


def _ask_three(console: Console, run: Path, world: WorldFiles) -> None:
    """Three held-out pictures, asked through the same session as `mono-internvl chat`."""
    chat = load(run / "model", device="cpu", precision="fp32")
    questions = read_questions(world.heldout, per_kind=1)
    chosen = {q.kind: q for q in questions if q.kind in ("caption", "colour", "grounding")}
    for kind in ("caption", "colour", "grounding"):
        question = chosen[kind]
        text = question.record["conversations"][0]["value"].removeprefix("<image>\n")
        image = world.heldout.parent / question.record["image"]
        chat.reset()
        answer = chat.ask(text, images=[image], max_new_tokens=LONGEST_ANSWER)
        console.print(f"  [dim]{image}[/]", soft_wrap=True)
        console.print(
            f"  Q: {text}\n  A: {answer.text}\n  (truth: {question.record['answer']})", markup=False
        )
    image = world.heldout.parent / chosen["caption"].record["image"]
    console.print("ask more:", soft_wrap=True)
    console.print(
        f"  mono-internvl chat --model {run / 'model'} --image {image} "
        '"how many objects are there?"',
        markup=False,
        soft_wrap=True,
    )
