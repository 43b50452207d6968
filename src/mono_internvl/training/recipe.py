"""A stage is data: frozen dataclasses that say what is trained, on what, and how fast.

A recipe is a Python object, so it is typed, diffed and reviewed like code; it is printed before a
run and saved beside every checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from mono_internvl.compute import Precision
from mono_internvl.data.batches import LossWeighting, OnBadSample
from mono_internvl.data.packing import Packing
from mono_internvl.errors import RecipeError
from mono_internvl.processing.fast_decoding import Decoding
from mono_internvl.training.checks import (
    FOLDER_NAME,
    TEXT,
    check_fields,
    choice,
    integer,
    number,
    one,
    optional,
    pair_of,
    positive_or_infinite,
    tuple_of,
)
from mono_internvl.training.objectives.next_token import NextToken
from mono_internvl.training.objectives.objective import Objective
from mono_internvl.training.recompute import Recompute

Schedule = Literal["constant", "cosine"]
Compiling = Literal["none", "layers"]
OnBadStep = Literal["stop", "skip"]

OLD_NAMES = {"warmup_share": "warmup_ratio", "final_rate_share": "final_rate_ratio"}
"""Fields of a stage as earlier recipes and states call them, and their names now."""
_NEXT_TOKEN = NextToken()
_MOST_SAMPLES = 1 << 20
"""Of a step; the positions of a window of steps are held in memory."""


def current_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a stage by today's names."""
    return {OLD_NAMES.get(name, name): value for name, value in fields.items()}


@dataclass(frozen=True)
class Rule:
    """One line of a stage's table: what is trainable at which rate, or frozen.

    Attributes:
        pattern: Regular expression, searched in a parameter's name. The first rule found counts.
        learning_rate: Peak rate; None freezes.
    """

    pattern: str
    learning_rate: float | None

    def __post_init__(self) -> None:
        check_fields(f"rule {self.pattern!r}", self, _RULE_CHECKS)


_RULE_CHECKS = {
    "pattern": TEXT,
    "learning_rate": optional(number(at_least=0), "freeze"),
}

_Class = TypeVar("_Class")


def _accepting_old_names(cls: type[_Class]) -> type[_Class]:
    """Let a class be made with `OLD_NAMES`, too: recipe files of before go on to work."""
    with_current_names = cls.__init__  # type: ignore[misc]

    @functools.wraps(with_current_names)
    def with_any_names(self: Any, **fields: Any) -> None:
        with_current_names(self, **current_names(fields))

    cls.__init__ = with_any_names  # type: ignore[misc,method-assign]
    return cls


@_accepting_old_names
@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training.

    Attributes:
        name: Folder name of its run.
        title: What it teaches, in a few words.
        data: Meta file of its sources, relative to the data folder.
        rules: What is trainable; must cover every parameter, none of them dead.
        objective: What is minimised.
        steps: Optimizer steps; 0 takes them from `epochs`.
        epochs: Passes over the data, where `steps` is 0.
        batch_size: Samples per step, over all processes and accumulation.
        accumulation: Micro-batches per step.
        schedule: Of the rate after warm-up; "cosine" falls to `final_rate_ratio`.
        warmup_steps: Linear warm-up; 0 takes it from `warmup_ratio`.
        warmup_ratio: Of all steps, where `warmup_steps` is 0.
        final_rate_ratio: Of the peak rate, which a cosine schedule reaches after the last step.
        weight_decay: On weights of two or more dimensions.
        clip_norm: Largest norm of the gradient.
        max_tokens: Longest sample, visual tokens included.
        max_tiles: Most tiles per image, thumbnail not counted; shared by the images of a sample.
        loss_weighting: See `BatchPlan`.
        packing: "best_fit" packs the samples of a step into rows of `packed_tokens`, each a
            micro-batch: as many as it takes, so that `accumulation` stays 1. "none" pads.
        packed_tokens: Most tokens of a packed row.
        decoding: "exact" decodes and scales images as the released code does, "fast" in half of the
            time with a few grey levels' difference, see `DECODINGS`.
        precision: "bf16" autocasts over fp32 weights; "fp32" does not; "auto" takes what the
            machine multiplies faster, see `mono_internvl.compute`, and keeps it when resumed.
        seed: Of the data order.
        checkpoint_every: Steps between saved states; 0 saves at the end only.
        keep_last: How many of the latest states stay while the stage runs.
        keep_every: States of a multiple of so many steps stay for good; 0 keeps none.
        on_bad_step: What is done about a step whose loss or gradient is not finite, or whose loss
            leaps: "stop" ends the run, "skip" leaves the weights as they are.
        max_loss_ratio: Of a step's loss to the running mean; above it the loss leaps.
        on_bad_sample: "raise" or "skip".
        max_skipped_ratio: Of all records read, how many may be skipped before the run stops.
        loader_workers: Reader processes per training process; 0 reads in the loop.
        recompute: What the backward pass computes again to save memory: "none", "selective" (norms,
            rotations, SwiGLU, softmax) or "full" (whole layers).
        compiling: "layers" compiles every decoder layer (`torch.compile`); "none" does not.
    """

    name: str
    title: str
    data: str
    rules: tuple[Rule, ...]
    batch_size: int
    objective: Objective = _NEXT_TOKEN
    steps: int = 0
    epochs: float = 0.0
    accumulation: int = 1
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    final_rate_ratio: float = 0.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float = 1.0
    max_tokens: int = 2048
    max_tiles: int = 12
    loss_weighting: LossWeighting = "token"
    packing: Packing = "none"
    packed_tokens: int = 8192
    decoding: Decoding = "exact"
    precision: Precision = "auto"
    seed: int = 0
    checkpoint_every: int = 0
    keep_last: int = 1
    keep_every: int = 0
    on_bad_step: OnBadStep = "stop"
    max_loss_ratio: float = math.inf
    on_bad_sample: OnBadSample = "raise"
    max_skipped_ratio: float = 0.1
    loader_workers: int = 0
    recompute: Recompute = "none"
    compiling: Compiling = "none"

    def __post_init__(self) -> None:
        check_fields(f"stage {self.name!r}", self, STAGE_CHECKS)
        if not self.steps and not self.epochs:
            raise RecipeError(f"stage {self.name!r}: steps=0 and epochs=0; give one of them")
        if self.batch_size % self.accumulation:
            raise RecipeError(
                f"stage {self.name!r}: batch_size={self.batch_size} is not a multiple of "
                f"accumulation={self.accumulation}; change one of them"
            )
        if self.objective.reads_pairs and (self.loss_weighting, self.packing) != ("sample", "none"):
            raise RecipeError(
                f"stage {self.name!r}: loss_weighting={self.loss_weighting!r}, packing="
                f"{self.packing!r}; objective {self.objective.name!r} learns from pairs: "
                'set loss_weighting="sample" and packing="none"'
            )
        if self.packing == "none":
            return
        if self.packed_tokens < self.max_tokens:
            raise RecipeError(
                f"stage {self.name!r}: packed_tokens={self.packed_tokens} cannot hold a sample of "
                f"max_tokens={self.max_tokens}; raise one or lower the other"
            )
        if self.accumulation > 1:
            raise RecipeError(
                f"stage {self.name!r}: accumulation={self.accumulation} with packing="
                f"{self.packing!r}, where every row of packed_tokens={self.packed_tokens} is a "
                "micro-batch; set accumulation=1"
            )

    def resolved(self, num_records: int) -> Stage:
        """The same stage with its steps and warm-up in numbers.

        Args:
            num_records: Records of one pass over its data.
        """
        steps = self.steps or max(1, math.ceil(self.epochs * num_records / self.batch_size))
        warmup = self.warmup_steps or round(self.warmup_ratio * steps)
        return dataclasses.replace(self, steps=steps, warmup_steps=warmup)

    def rate_ratio(self, step: int) -> float:
        """Rate over the peak rate at a step (0 is the first)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_rate_ratio + (1 - self.final_rate_ratio) * cosine


STAGE_CHECKS = {
    "name": FOLDER_NAME,
    "title": TEXT,
    "data": TEXT,
    "rules": tuple_of(Rule, at_least=1),
    "objective": one(Objective, "an objective, such as NextToken()"),
    "batch_size": integer(1, _MOST_SAMPLES),
    "accumulation": integer(1, _MOST_SAMPLES),
    "steps": integer(0),
    "epochs": number(at_least=0),
    "schedule": choice(Schedule),
    "warmup_steps": integer(0),
    "warmup_ratio": number(at_least=0, at_most=1),
    "final_rate_ratio": number(at_least=0, at_most=1),
    "weight_decay": number(at_least=0),
    "betas": pair_of(number(at_least=0, below=1)),
    "eps": number(at_least=0),
    "clip_norm": positive_or_infinite(),
    "max_tokens": integer(1),
    "max_tiles": integer(1),
    "loss_weighting": choice(LossWeighting),
    "packing": choice(Packing),
    "packed_tokens": integer(1),
    "decoding": choice(Decoding),
    "precision": choice(Precision),
    "seed": integer(0),
    "checkpoint_every": integer(0),
    "keep_last": integer(1),
    "keep_every": integer(0),
    "on_bad_step": choice(OnBadStep),
    "max_loss_ratio": positive_or_infinite(),
    "on_bad_sample": choice(OnBadSample),
    "max_skipped_ratio": number(at_least=0, at_most=1),
    "loader_workers": integer(0),
    "recompute": choice(Recompute),
    "compiling": choice(Compiling),
}
"""What each field of a stage may be."""


@dataclass(frozen=True, kw_only=True)
class PublishedData:
    """A part of what a published stage was trained on; for a person, nothing reads it.

    Attributes:
        stage: Name of the stage.
        task: What it teaches.
        datasets: Names as published, with languages where they are given.
        ratio: Of the stage's samples, from 0 to 1; None where it is not published.
        prompt: The question that was asked; None where it is not published.
    """

    stage: str
    task: str
    datasets: tuple[str, ...]
    ratio: float | None = None
    prompt: str | None = None

    def __post_init__(self) -> None:
        check_fields(f"published data of stage {self.stage!r}", self, _PUBLISHED_CHECKS)


_PUBLISHED_CHECKS = {
    "stage": TEXT,
    "task": TEXT,
    "datasets": tuple_of(str, at_least=1),
    "ratio": optional(number(at_least=0, at_most=1), "say that it is not published"),
    "prompt": optional(TEXT, "say that it is not published"),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages in order; each starts from the checkpoint of the one before.

    Attributes:
        name: Of the recipe and its run folder.
        source: Where the numbers come from: paper section, or our own choice.
        stages: In order.
        start: Checkpoint the first stage starts from; None takes the one given at the command line.
        notes: What to know before a run; printed.
        ours: What stands in no source and was chosen here; printed as such.
        published_data: What the published stages were trained on.
    """

    name: str
    source: str
    stages: tuple[Stage, ...]
    start: str | None = None
    notes: tuple[str, ...] = field(default=())
    ours: tuple[str, ...] = field(default=())
    published_data: tuple[PublishedData, ...] = field(default=())

    def __post_init__(self) -> None:
        check_fields(f"recipe {self.name!r}", self, _RECIPE_CHECKS)
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise RecipeError(
                f"recipe {self.name!r}: stage names repeat: {names}; each is a folder of its own"
            )
        for part in self.published_data:
            if part.stage not in names:
                raise RecipeError(
                    f"recipe {self.name!r}: published data of stage {part.stage!r}; expected one "
                    f"of {', '.join(names)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for printing and for the file beside the checkpoint."""
        return dataclasses.asdict(self)


_RECIPE_CHECKS = {
    "name": FOLDER_NAME,
    "source": TEXT,
    "stages": tuple_of(Stage, at_least=1),
    "start": optional(TEXT, "take the one given at the command line"),
    "notes": tuple_of(str),
    "ours": tuple_of(str),
    "published_data": tuple_of(PublishedData),
}


def load_recipe(name_or_file: str, known: dict[str, Recipe]) -> Recipe:
    """A recipe by name, or the `RECIPE` of a Python file of the user's.

    Raises:
        RecipeError: No such name or file, or the file defines no `RECIPE` or raises anything.
    """
    if name_or_file in known:
        return known[name_or_file]
    path = Path(name_or_file)
    if path.suffix != ".py":
        raise RecipeError(
            f"no recipe {name_or_file!r}; known: {', '.join(known)}; or give a .py file"
        )
    if not path.is_file():
        raise RecipeError(
            f"{path}: no such recipe file; check the path, or name one of {', '.join(known)}"
        )
    spec = importlib.util.spec_from_file_location("user_recipe", path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path}: cannot be read as Python; give a readable .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses defined in the file look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is the user's: it may raise anything
        raise RecipeError(f"{path}: {type(error).__name__}: {error}; correct the file") from error
    recipe = getattr(module, "RECIPE", None)
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{path}: defines no RECIPE of type mono_internvl.training.recipe.Recipe; add "
            "RECIPE = Recipe(...)"
        )
    for stage in recipe.stages:
        if type(stage.objective).__module__ == spec.name:
            raise RecipeError(
                f"{path}: defines the objective {type(stage.objective).__name__} itself; other "
                "processes import it by name, so put it into a module that Python finds"
            )
    return recipe
