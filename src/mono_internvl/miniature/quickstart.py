"""The main job: a small language model learns to see, in the paper's four stages, on a CPU.

Data, starting model, four stages, an evaluation after each, `metrics.json`, `report.html`, and
three questions answered on the screen. What is there already is skipped: a killed run goes on.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from mono_internvl import miniature
from mono_internvl.compute import ComputePlan, make_plan
from mono_internvl.data.records import parse_record
from mono_internvl.data.sources import FileImage
from mono_internvl.distributed import barrier, rank, run_processes, world_size
from mono_internvl.evaluation.perplexity import perplexity
from mono_internvl.evaluation.questions import Question, first_of_each_kind
from mono_internvl.evaluation.runner import Subject, ask
from mono_internvl.miniature import WorldFiles, WorldSize
from mono_internvl.miniature.english import ASSETS
from mono_internvl.miniature.language_model import add_vision, make_language_model
from mono_internvl.miniature.recipes import (
    LANGUAGE,
    MINIATURE,
    QUICK_LANGUAGE,
    QUICK_MINIATURE,
    seeded,
)
from mono_internvl.miniature.report_words import WORDS
from mono_internvl.miniature.scoring import BENCHMARK, PROTOCOL, TEXT_KINDS, mean_scores
from mono_internvl.miniature.targets import (
    CHANCE,
    FULL_BOUNDS,
    QUICK_BOUNDS,
    Bound,
    bounds_in,
    judge,
)
from mono_internvl.miniature.text_tasks import english_records
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.prompts import Conversation
from mono_internvl.reports.report import write_report
from mono_internvl.runs.folder import begin, exclusive, resumable
from mono_internvl.runs.predictions import Prediction, read_predictions
from mono_internvl.runs.provenance import origin
from mono_internvl.runs.schemas import (
    START,
    RunMetrics,
    Score,
    StageResult,
    TextMeasures,
    add_cost,
    cpu_minutes,
)
from mono_internvl.serving.loading import load
from mono_internvl.training.estimate import Estimate, estimate, in_minutes
from mono_internvl.training.loop import train_stage
from mono_internvl.training.recipe import Recipe, Stage
from mono_internvl.training.state import keep_plan

SHIPPED_LANGUAGE_MODEL = ASSETS / "language_model"
SETTINGS = "quickstart.json"


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
    """Teach a small language model to see and show what it learnt.

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
        console.print(
            "[bold]2/5[/] the model: a language model with visual experts", soft_wrap=True
        )
        if not (run / START / "checkpoint").exists():
            _make_start(llm, world, run, plan, compute, seed)
        console.print("[bold]3/5[/] four stages, an evaluation after each", soft_wrap=True)
        expected = _estimate(console, plan, world, run, compute)
        arguments = (plan, world, run, compute, expected)
        run_processes(train_and_evaluate, compute.processes, *arguments, threads=compute.threads)
        console.print("[bold]4/5[/] the report", soft_wrap=True)
        metrics = collect(run, plan, quick, compute, time.perf_counter() - began, seed)
        metrics.write(run)
        last = run / plan.recipe.stages[-1].name / "checkpoint"
        shutil.copytree(last, run / "model", dirs_exist_ok=True)
        report = write_report(run, WORDS)
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
    add_vision(folder, run / START / "checkpoint", seed=seed)


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
    done, answers = run / name / "text.json", predictions_of(run, name)
    if done.exists():
        check_protocol(answers, compute, f"delete {done} to ask anew, or choose another folder")
        return
    with _Cost(run / name, "evaluated"):
        subject = Subject.load(checkpoint, compute)
        heldout = BENCHMARK.questions(world.heldout)
        sighted = first_of_each_kind(heldout, plan.per_kind if is_last else plan.per_kind_between)
        blind = first_of_each_kind(
            heldout, plan.per_kind_blind_last if is_last else plan.per_kind_blind
        )
        if not is_last:
            sighted = [q for q in sighted if not q.record.get("aligned")]
        text = first_of_each_kind(BENCHMARK.questions(world.probes_heldout), plan.text_per_kind)
        hidden = [question.without_images() for question in blind]
        ask(subject, BENCHMARK, PROTOCOL, sighted, hidden, text, out=answers)
        if rank() == 0:
            english = english_conversations(world, plan.english_records)
            TextMeasures(
                perplexity=perplexity(subject.model, subject.processor, english),
                logits_identical=_same_text_logits(subject, run, text),
            ).write(done)
        barrier()


def predictions_of(run: Path, stage: str) -> Path:
    """The file of a stage's answers."""
    return run / "predictions" / f"{stage}.jsonl"


def check_protocol(answers: Path, compute: ComputePlan, next_step: str) -> None:
    """Refuse answers that were not given as those of this run are.

    Raises:
        ConfigError: They name another protocol, or none.
        SampleError: They cannot be read.
    """
    for one in read_predictions(answers):
        PROTOCOL.planned(compute).check_same(one.protocol, str(answers), next_step)


def english_conversations(world: WorldFiles, count: int) -> list[Conversation]:
    """The first held-out paragraphs of plain English, for the perplexity."""
    file = world.english_heldout
    paragraphs = [p for p in file.read_text().split("\n\n") if p.strip()]
    records = english_records(paragraphs)[:count]
    return [
        parse_record(record, index, f"{file}[{index}]", lambda name: FileImage(Path(name))).turns
        for index, record in enumerate(records)
    ]


@torch.inference_mode()
def _same_text_logits(subject: Subject, run: Path, questions: Sequence[Question]) -> bool:
    """Whether text-only logits equal, bit for bit, those of the model before the first stage."""
    model = subject.model
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
        ids = subject.processor.encode_conversation(question.sample.turns).input_ids[None]
        ids = ids.to(model.device)
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
        add_cost(self.file, self.key, time.process_time() - self.began)


def collect(
    run: Path, plan: Plan, quick: bool, compute: ComputePlan, seconds: float, seed: int
) -> RunMetrics:
    """Everything that was measured, from the files of a finished run: `metrics.json`."""
    names = (START, *(stage.name for stage in plan.recipe.stages))
    predictions = {name: read_predictions(predictions_of(run, name)) for name in names}
    text = {name: TextMeasures.read(run / name / "text.json") for name in names}
    costs = {name: cpu_minutes(run / name) for name in names}
    minutes = sum(costs.values())
    bounds = bounds_in(compute.precision, plan.bounds)
    stages: dict[str, Stage] = {stage.name: stage for stage in plan.recipe.stages}
    return RunMetrics(
        name="quickstart",
        is_quick=quick,
        seed=seed,
        cpu_minutes=minutes,
        minutes=seconds / 60,
        targets=judge(bounds, predictions, text, minutes),
        stages=[
            _stage_result(name, stages.get(name), predictions[name], text[name], costs[name])
            for name in names
        ],
        **origin(compute, PROTOCOL.planned(compute).to_dict()),
    )


def _stage_result(
    name: str,
    stage: Stage | None,
    predictions: Sequence[Prediction],
    text: TextMeasures,
    cpu_minutes: float,
) -> StageResult:
    sighted, blind = mean_scores(predictions), mean_scores(predictions, blind=True)
    aligned = mean_scores(predictions, aligned=True)
    facts = [kind for kind in sighted if kind.startswith("facts_")]
    said = {kind: sighted[kind].score for kind in (*facts, *TEXT_KINDS) if kind in sighted}
    return StageResult(
        name=name,
        title=stage.title if stage else "before the first stage",
        trains=_trains(stage),
        steps=stage.steps if stage else 0,
        samples=stage.steps * stage.batch_size if stage else 0,
        cpu_minutes=cpu_minutes,
        scores={
            kind: Score(
                value=mean.score,
                blind=blind[kind].score if kind in blind else None,
                chance=CHANCE.get(kind),
                items=mean.items,
                aligned=aligned[kind].score if kind in aligned else None,
            )
            for kind, mean in sighted.items()
            if kind not in said
        },
        text={"perplexity": text.perplexity, **said},
        is_text_identical=text.logits_identical,
    )


def _trains(stage: Stage | None) -> str:
    if stage is None:
        return "nothing"
    learned = [rule for rule in stage.rules if rule.learning_rate is not None]
    return ", ".join(f"{rule.pattern} at {rule.learning_rate:g}" for rule in learned)


def _show_targets(console: Console, metrics: RunMetrics, llm: str) -> None:
    for target in metrics.targets:
        value = "-" if target.value is None else f"{target.value:.2f}"
        sign = ">=" if target.higher_is_better else "<="
        bound = f"must be {sign} {target.must:g}" if target.must is not None else "reported"
        mark = "[green]ok[/]" if target.is_met else "[red]missed[/]"
        if target.value is None:
            mark = "[yellow]not measured[/]"
        console.print(f"  {target.name:<55} {value:>7}  ({bound}) {mark}", soft_wrap=True)
    if llm not in ("shipped", "scratch"):
        console.print(
            "  The bounds were chosen for the shipped language model. What another one keeps is "
            "not measured where it knew nothing before the first stage.",
            soft_wrap=True,
        )


def _ask_three(console: Console, run: Path, world: WorldFiles) -> None:
    """Three held-out pictures, asked through the same session as `mono-internvl chat`."""
    chat = load(run / "model", device="cpu", precision="fp32")
    questions = first_of_each_kind(BENCHMARK.questions(world.heldout), 1)
    chosen = {q.kind: q for q in questions if q.kind in ("caption", "colour", "grounding")}
    for kind in ("caption", "colour", "grounding"):
        question = chosen[kind]
        text, image = question.text, world.heldout.parent / question.record["image"]
        chat.reset()
        answer = chat.ask(text, images=[image], max_new_tokens=PROTOCOL.max_new_tokens)
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
