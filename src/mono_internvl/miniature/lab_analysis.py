"""`mono-internvl lab NAME`: one experiment of the paper, in miniature; `lab_experiments` has them.

A lab trains variants of the miniature's recipe with several seeds. Every variant gets the same
search of rates on the validation split (seed 0, a factor on all rates of what the lab compares);
then the held-out split is asked once. What two chains of stages begin alike is trained once: a
stage lies in a folder that is named after everything that made it.

Labs are shorter than the quickstart, so that one ends within an hour on two cores.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from mono_internvl import miniature
from mono_internvl.compute import ComputePlan, make_plan
from mono_internvl.distributed import run_side_by_side
from mono_internvl.errors import ConfigError
from mono_internvl.evaluation.perplexity import perplexity
from mono_internvl.evaluation.questions import Question, first_of_each_kind
from mono_internvl.evaluation.runner import Subject, ask
from mono_internvl.miniature import WorldFiles
from mono_internvl.miniature.lab_evip import Variant
from mono_internvl.miniature.lab_rates import scaled
from mono_internvl.miniature.language_model import add_vision
from mono_internvl.miniature.quickstart import (
    FULL,
    QUICK,
    SHIPPED_LANGUAGE_MODEL,
    Plan,
    english_conversations,
)
from mono_internvl.miniature.recipes import RATE_FACTORS, seeded
from mono_internvl.miniature.scoring import BENCHMARK, PROTOCOL, TEXT_KINDS, mean_scores
from mono_internvl.miniature.targets import CHANCE
from mono_internvl.runs.folder import begin, exclusive, resumable, write_whole
from mono_internvl.runs.json_lines import read_lines
from mono_internvl.runs.provenance import Origin, origin
from mono_internvl.runs.schemas import START, stage_label
from mono_internvl.training.loop import train_stage
from mono_internvl.training.recipe import Recipe, Stage
from mono_internvl.training.state import keep_plan

ROWS, PAGE = "runs.jsonl", "page.md"
VISION_KINDS = tuple(kind for kind in BENCHMARK.metrics if kind not in TEXT_KINDS)

FULL_LAB = dataclasses.replace(
    FULL, bounds={}, per_kind=150, per_kind_blind=60, text_per_kind=100, english_records=100
)
"""What a lab asks; the world is the quickstart's."""
QUICK_LAB = dataclasses.replace(
    QUICK, bounds={}, per_kind=4, per_kind_blind=4, text_per_kind=8, english_records=8
)
"""The same path with small numbers."""
QUICK_STEPS = 6
_VALIDATION_PER_KIND = 60


@dataclass(frozen=True)
class Claim:
    """What the paper says, as one number of this lab.

    Attributes:
        text: In words.
        paper: The paper's figures and where they stand.
        contrast: Variant -> weight; the claim is that the weighted sum is above minus `margin`.
        measures: Whose mean is taken; a perplexity counts by its logarithm.
        margin: How much less is still as good.
    """

    text: str
    paper: str
    contrast: Mapping[str, float]
    measures: tuple[str, ...]
    margin: float = 0.0


@dataclass(frozen=True)
class Lab:
    """One experiment.

    Attributes:
        title: Of its page.
        steps: Of each stage, by name.
        variants: Recipe of EViP's four stages -> what is compared.
        claims: What is held against the paper.
        kinds: Asked after the last stage; their mean on the validation split chooses the rates.
        between: Kinds that are asked after earlier stages, by name of the stage; text is, too.
        num_searched: How many of the last stages the searched factor is on; None is all.
        factors: On the rates.
        note: What the lab cannot show, or does in another way than the paper.
    """

    title: str
    steps: Mapping[str, int]
    variants: Callable[[Recipe], tuple[Variant, ...]]
    claims: tuple[Claim, ...]
    kinds: tuple[str, ...] = VISION_KINDS
    between: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    num_searched: int | None = None
    factors: tuple[float, ...] = RATE_FACTORS
    note: str = ""


@dataclass(frozen=True)
class Measured:
    """One figure of a run.

    Attributes:
        value: Of a kind, the mean score.
        items: Records behind it; None where it is no mean over records.
        blind: The same with the images hidden; None where that was not asked.
        chance: Of a guess; None where there is none.
    """

    value: float
    items: int | None = None
    blind: float | None = None
    chance: float | None = None


@dataclass(frozen=True, kw_only=True)
class LabRun(Origin):
    """One variant with one seed.

    Attributes:
        lab: Name of the lab.
        variant: Name of the variant.
        title: Of its column.
        seed: Of world, data order and first weights.
        quick: Whether it is a check that everything runs.
        factor: On the rates, as the validation split chose it.
        searched: Validation score by factor.
        samples: By stage.
        figures: By name of the measure; those taken after an earlier stage begin with its label.
    """

    lab: str
    variant: str
    title: str
    seed: int
    quick: bool
    factor: float
    searched: Mapping[str, float]
    samples: Mapping[str, int]
    figures: Mapping[str, Measured]


def shortened(recipe: Recipe, steps: Mapping[str, int]) -> Recipe:
    """The recipe with other numbers of steps; stages that are not named keep theirs."""
    stages = tuple(with_steps(stage, steps.get(stage.name, stage.steps)) for stage in recipe.stages)
    return dataclasses.replace(recipe, stages=stages)


def with_steps(stage: Stage, steps: int) -> Stage:
    """A stage of so many steps, at most a tenth of them warm-up."""
    return dataclasses.replace(
        stage, steps=steps, warmup_steps=min(stage.warmup_steps, max(1, steps // 10))
    )


@dataclass(frozen=True)
class _Task:
    """A variant with a seed and a factor on its rates, and where its parts lie."""

    variant: Variant
    seed: int
    factor: float
    num_searched: int | None
    world: WorldFiles
    run: Path
    compute: ComputePlan

    @property
    def stages(self) -> tuple[Stage, ...]:
        recipe = seeded(self.variant.recipe, self.seed)
        whole, changed = recipe.stages, scaled(recipe, self.factor).stages
        first = 0 if self.num_searched is None else len(whole) - self.num_searched
        return (*whole[:first], *changed[first:])

    @property
    def start(self) -> Path:
        """Checkpoint that the first stage starts from."""
        made_of = {"experts": self.variant.visual_experts, **self.variant.config}
        return self._seed_folder / f"{START}-{_digest(made_of)}" / "checkpoint"

    def folder(self, number: int) -> Path:
        """Of a stage: named after the chain that leads to it."""
        chain = [dataclasses.asdict(stage) for stage in self.stages[: number + 1]]
        name = self.stages[number].name
        return self._seed_folder / f"{name}-{_digest([str(self.start.parent.name), chain])}"

    @property
    def last(self) -> Path:
        return self.folder(len(self.stages) - 1)

    @property
    def _seed_folder(self) -> Path:
        return self.run / f"seed{self.seed}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def run_lab(
    name: str,
    lab: Lab,
    page: Callable[[Lab, Sequence[LabRun]], str],
    run: Path,
    *,
    seeds: int = 3,
    quick: bool = False,
    processes: int = 2,
    device: str = "cpu",
    precision: str = "auto",
) -> Path:
    """Search rates, train every variant with every seed, measure, and write rows and a page.

    A second call goes on where the first stopped, and may add seeds.

    Args:
        name: Of the lab, for its rows.
        lab: What is compared.
        page: Lab and rows -> Markdown.
        run: Output folder.
        seeds: How many, from 0; seed 0 has the search.
        quick: The same path with small numbers; its scores mean nothing.
        processes: Trainings side by side, each in one process.
        device: Of training and evaluation.
        precision: "auto", "bf16" or "fp32"; a run that goes on keeps what it began with.

    Returns:
        The page.

    Raises:
        ConfigError: No seed, or `run` was begun as another lab or with other sizes.
    """
    if seeds < 1:
        raise ConfigError(f"seeds={seeds}; expected at least 1")
    plan = QUICK_LAB if quick else FULL_LAB
    steps = dict.fromkeys(lab.steps, QUICK_STEPS) if quick else lab.steps
    variants = lab.variants(shortened(plan.recipe, steps))
    factors = lab.factors[:2] if quick else lab.factors
    console = Console(stderr=True, highlight=False)
    with exclusive(run), resumable(run):
        begin(run / "lab.json", {"lab": name, "quick": quick})
        compute = make_plan(device, precision, processes=1, threads=1 if processes > 1 else None)
        compute = keep_plan(run, compute, precision)
        places = [(run / "data" / f"seed{seed}", plan.size, seed) for seed in range(seeds)]
        run_side_by_side(miniature.write_world, places, processes)
        worlds = [miniature.write_world(*place) for place in places]

        def task(variant: Variant, seed: int, factor: float) -> _Task:
            return _Task(variant, seed, factor, lab.num_searched, worlds[seed], run, compute)

        for seed in range(seeds):
            for variant in variants:
                _make_start(task(variant, seed, 1.0), task(variants[0], seed, 1.0).start)
        search = [task(variant, 0, factor) for variant in variants for factor in factors]
        console.print(f"search of rates: {len(search)} runs", soft_wrap=True)
        _train(search, processes)
        run_side_by_side(_validate, [(one, lab.kinds, plan) for one in search], processes)
        found: dict[str, dict[float, float]] = {}
        for one in search:
            found.setdefault(one.variant.name, {})[one.factor] = _validation_score(one)
        chosen = [
            task(variant, seed, max(factors, key=found[variant.name].__getitem__))
            for seed in range(seeds)
            for variant in variants
        ]
        console.print(f"variants and seeds: {len(chosen)} runs", soft_wrap=True)
        _train(chosen, processes)
        run_side_by_side(_measure, [(one, lab, plan) for one in chosen], processes)
        runs = [_row(name, quick, one, found[one.variant.name]) for one in chosen]
        lines = [json.dumps(dataclasses.asdict(one)) for one in runs]
        write_whole(run / ROWS, "\n".join(lines))
        write_whole(run / PAGE, page(lab, runs))
    return run / PAGE


def _make_start(task: _Task, weights_of: Path) -> None:
    """The model that a variant starts from, with the vision weights of the seed's first one."""
    if not task.start.exists():
        task.start.parent.mkdir(parents=True, exist_ok=True)
        add_vision(
            SHIPPED_LANGUAGE_MODEL,
            task.start,
            task.variant.visual_experts,
            seed=task.seed,
            weights_of=None if task.start == weights_of else weights_of,
            **task.variant.config,
        )


def _train(tasks: Sequence[_Task], processes: int) -> None:
    """Train what the tasks need, stage after stage; what several of them need, once."""
    for number in range(max(len(task.stages) for task in tasks)):
        left: dict[Path, tuple[Stage, Path, Path, Path, ComputePlan]] = {}
        for task in tasks:
            if number >= len(task.stages):
                continue
            before = task.folder(number - 1) / "checkpoint" if number else task.start
            folder = task.folder(number)
            if not (folder / "checkpoint").exists():
                stage = task.stages[number]
                left[folder] = (stage, before, task.world.root, folder, task.compute)
        run_side_by_side(_train_one, list(left.values()), processes)


def _train_one(stage: Stage, start: Path, data: Path, folder: Path, compute: ComputePlan) -> None:
    train_stage(stage, start, data, folder, device=compute.device, plan=compute)


# ------------------------------------------------------------------ what is measured


def _validate(task: _Task, kinds: Sequence[str], plan: Plan) -> None:
    """The mean over kinds on the validation split; the held-out one is not looked at."""
    file = task.last / "validation.json"
    if file.exists():
        return
    subject = Subject.load(task.last / "checkpoint", task.compute)
    count = min(_VALIDATION_PER_KIND, plan.per_kind or _VALIDATION_PER_KIND)
    questions = first_of_each_kind(_asked(task.world.validation, kinds), count)
    answers = ask(subject, BENCHMARK, PROTOCOL, questions, out=file.with_suffix(".jsonl"))
    score = fmean(mean.score for mean in mean_scores(answers).values())
    write_whole(file, json.dumps({"score": score}))


def _validation_score(task: _Task) -> float:
    score: float = json.loads((task.last / "validation.json").read_text("utf-8"))["score"]
    return score


def _measure(task: _Task, lab: Lab, plan: Plan) -> None:
    """Held-out answers after the last stage, and after those that the lab looks at on the way."""
    for number, stage in enumerate(task.stages):
        is_last = number == len(task.stages) - 1
        if is_last or stage.name in lab.between:
            kinds = lab.kinds if is_last else lab.between[stage.name]
            _measure_stage(task, task.folder(number), kinds, plan, asks_blind=is_last)


def _measure_stage(
    task: _Task, folder: Path, kinds: Sequence[str], plan: Plan, asks_blind: bool
) -> None:
    file = folder / ("figures.json" if asks_blind else "figures-between.json")
    if file.exists():
        return
    subject = Subject.load(folder / "checkpoint", task.compute)
    heldout = [q for q in _asked(task.world.heldout, kinds) if not q.record.get("aligned")]
    sighted = first_of_each_kind(heldout, plan.per_kind)
    blind = first_of_each_kind(heldout, plan.per_kind_blind) if asks_blind else []
    probes = BENCHMARK.questions(task.world.probes_heldout)
    text = first_of_each_kind(probes, plan.text_per_kind)
    hidden = [question.without_images() for question in blind]
    out = file.with_suffix(".jsonl")
    answers = ask(subject, BENCHMARK, PROTOCOL, sighted, hidden, text, out=out)
    unseen = mean_scores(answers, blind=True)
    figures = {
        _measure_name(kind): Measured(
            mean.score,
            mean.items,
            unseen[kind].score if kind in unseen else None,
            CHANCE.get(kind),
        )
        for kind, mean in mean_scores(answers).items()
    }
    english = english_conversations(task.world, plan.english_records)
    of_text = perplexity(subject.model, subject.processor, english)
    figures["text: perplexity"] = Measured(of_text)
    write_whole(file, json.dumps({k: dataclasses.asdict(one) for k, one in figures.items()}))


def _measure_name(kind: str) -> str:
    is_text = kind in TEXT_KINDS or kind.startswith("facts_")
    return f"text: {kind.replace('_', ' ')}" if is_text else kind


def _asked(file: Path, kinds: Sequence[str]) -> list[Question]:
    return [question for question in BENCHMARK.questions(file) if question.kind in kinds]


def _row(name: str, quick: bool, task: _Task, searched: Mapping[float, float]) -> LabRun:
    figures: dict[str, Measured] = {}
    for number, stage in enumerate(task.stages):
        folder, is_last = task.folder(number), number == len(task.stages) - 1
        file = folder / ("figures.json" if is_last else "figures-between.json")
        if file.exists():
            prefix = "" if is_last else f"{stage_label(stage.name)}: "
            for measure, figure in json.loads(file.read_text("utf-8")).items():
                figures[f"{prefix}{measure}"] = Measured(**figure)
    return LabRun(
        lab=name,
        variant=task.variant.name,
        title=task.variant.title,
        seed=task.seed,
        quick=quick,
        factor=task.factor,
        searched={f"{factor:g}": score for factor, score in searched.items()},
        samples={stage.name: stage.steps * stage.batch_size for stage in task.stages},
        figures=figures,
        **origin(task.compute, PROTOCOL.planned(task.compute).to_dict()),
    )


def read_lab_runs(file: Path) -> list[LabRun]:
    """The runs in a file of rows; none if there is no such file.

    Raises:
        ConfigError: A line is no run of a lab.
    """
    runs = []
    for number, line in enumerate(read_lines(file) if file.is_file() else (), start=1):
        try:
            row = json.loads(line)
            figures = {name: Measured(**one) for name, one in row.pop("figures").items()}
            runs.append(LabRun(**row, figures=figures))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{file}:{number}: {type(error).__name__}: {error}; expected a line of the "
                f"{ROWS} that `mono-internvl lab` writes"
            ) from error
    return runs
