"""A stage is data: frozen dataclasses that say what is learnt, from what, and how fast.

A recipe is a Python object, so it is typed, diffed and reviewed like code; it is printed before a
run and saved beside every checkpoint.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mono_internvl.compute import Precision
from mono_internvl.data.batches import LossWeighting, OnBadSample
from mono_internvl.errors import RecipeError
from mono_internvl.training.recompute import Recompute

_CHOICES = {
    "schedule": ("constant", "cosine"),
    "precision": get_args(Precision),
    "loss_weighting": get_args(LossWeighting),
    "on_bad_sample": get_args(OnBadSample),
    "recompute": get_args(Recompute),
}
_COUNTS = {
    "batch_size": 1,
    "accumulation": 1,
    "max_tokens": 1,
    "max_tiles": 1,
    "steps": 0,
    "warmup_steps": 0,
    "checkpoint_every": 0,
    "loader_workers": 0,
}
"""Fields that count something, and the least they may be."""
_MOST_SAMPLES = 1 << 20
"""Of a step; the positions of a window of steps are held in memory."""
_AMOUNTS = ("epochs", "weight_decay", "eps")
"""Fields that are finite and not negative."""
_RATIOS = ("warmup_share", "final_rate_share", "max_skipped_ratio")
"""Fields that are a part of something: from 0 to 1."""
_FOLDER_NAME = re.compile(r"\w[\w.+-]*")


@dataclass(frozen=True)
class Rule:
    """One line of a stage's table: what learns at which rate, or not at all.

    Attributes:
        pattern: Regular expression, searched in a parameter's name. The first rule found counts.
        learning_rate: Peak rate; None freezes.
    """

    pattern: str
    learning_rate: float | None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise RecipeError(
                f"rule pattern={self.pattern!r}; expected a regular expression, write it as text"
            )
        if self.learning_rate is not None and not _is_amount(self.learning_rate):
            raise RecipeError(
                f"rule {self.pattern!r}: learning_rate={self.learning_rate!r}; expected a finite "
                "number >= 0, or None to freeze"
            )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training.

    Attributes:
        name: Folder name of its run.
        title: What it teaches, in a few words.
        data: Meta file of its sources, relative to the data folder.
        rules: What learns; must cover every parameter, none of them dead.
        steps: Optimizer steps; 0 takes them from `epochs`.
        epochs: Passes over the data, where `steps` is 0.
        batch_size: Samples per step, over all processes and accumulation.
        accumulation: Micro-batches per step.
        schedule: Of the rate after warm-up; "cosine" falls to `final_rate_share`.
        warmup_steps: Linear warm-up; 0 takes it from `warmup_share`.
        warmup_share: Warm-up as a share of all steps, where `warmup_steps` is 0.
        final_rate_share: Of the peak rate, which a cosine schedule reaches after the last step.
        weight_decay: On weights of two or more dimensions.
        clip_norm: Largest norm of the gradient.
        max_tokens: Longest sample, visual tokens included.
        max_tiles: Most tiles per image, thumbnail not counted; shared by the images of a sample.
        loss_weighting: See `BatchPlan`.
        precision: "bf16" autocasts over fp32 weights; "fp32" does not; "auto" takes what the
            machine multiplies faster, see `mono_internvl.compute`, and keeps it when resumed.
        seed: Of the data order.
        checkpoint_every: Steps between saved states; 0 saves at the end only.
        on_bad_sample: "raise" or "skip".
        max_skipped_ratio: Of all records read, how many may be skipped before the run stops.
        loader_workers: Reader processes per training process; 0 reads in the loop.
        recompute: What the backward pass computes again to save memory: "none", "selective" (norms,
            rotations, SwiGLU, softmax) or "full" (whole layers).
    """

    name: str
    title: str
    data: str
    rules: tuple[Rule, ...]
    batch_size: int
    steps: int = 0
    epochs: float = 0.0
    accumulation: int = 1
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    warmup_share: float = 0.0
    final_rate_share: float = 0.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float = 1.0
    max_tokens: int = 2048
    max_tiles: int = 12
    loss_weighting: LossWeighting = "token"
    precision: Precision = "auto"
    seed: int = 0
    checkpoint_every: int = 0
    on_bad_sample: OnBadSample = "raise"
    max_skipped_ratio: float = 0.1
    loader_workers: int = 0
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        _check_folder_name("stage", self.name)
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RecipeError(
                    f"stage {self.name!r}: {name}={value!r}; give an integer >= {least}"
                )
        if self.batch_size > _MOST_SAMPLES:
            raise RecipeError(
                f"stage {self.name!r}: batch_size={self.batch_size}; give at most "
                f"{_MOST_SAMPLES:,} samples of a step"
            )
        for name in _AMOUNTS:
            if not _is_amount(getattr(self, name)):
                raise RecipeError(
                    f"stage {self.name!r}: {name}={getattr(self, name)!r}; give a finite number >= "
                    "0"
                )
        for name in _RATIOS:
            if not (_is_amount(value := getattr(self, name)) and value <= 1):
                raise RecipeError(
                    f"stage {self.name!r}: {name}={value!r}; give a number from 0 to 1"
                )
        is_pair = isinstance(self.betas, tuple) and len(self.betas) == 2
        if not is_pair or not all(_is_amount(beta) and beta < 1 for beta in self.betas):
            raise RecipeError(
                f"stage {self.name!r}: betas={self.betas!r}; give two numbers from 0 to below 1"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise RecipeError(
                    f"stage {self.name!r}: {name}={getattr(self, name)!r}; expected one of "
                    f"{', '.join(choices)}"
                )
        if not self.steps and not self.epochs:
            raise RecipeError(f"stage {self.name!r}: steps=0 and epochs=0; give one of them")
        if not (_is_amount(self.clip_norm) and self.clip_norm) and self.clip_norm != math.inf:
            raise RecipeError(
                f"stage {self.name!r}: clip_norm={self.clip_norm!r}; give a number > 0, inf for "
                "none"
            )
        if self.batch_size % self.accumulation:
            raise RecipeError(
                f"stage {self.name!r}: batch_size={self.batch_size} is not a multiple of "
                f"accumulation={self.accumulation}; change one of them"
            )
        if not self.rules:
            raise RecipeError(f"stage {self.name!r} has no rules; say what learns")

    def resolved(self, num_records: int) -> Stage:
        """The same stage with its steps and warm-up in numbers.

        Args:
            num_records: Records of one pass over its data.
        """
        steps = self.steps or max(1, math.ceil(self.epochs * num_records / self.batch_size))
        warmup = self.warmup_steps or round(self.warmup_share * steps)
        return dataclasses.replace(self, steps=steps, warmup_steps=warmup)

    def rate_share(self, step: int) -> float:
        """Share of the peak rate at a step (0 is the first)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_rate_share + (1 - self.final_rate_share) * cosine


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
        _check_folder_name("recipe", self.name)
        names = [stage.name for stage in self.stages]
        if not names:
            raise RecipeError(f"recipe {self.name!r} has no stage; give it at least one")
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


def _is_amount(value: Any) -> bool:
    """Whether a value is a finite number that is not negative."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value < math.inf


def _check_folder_name(kind: str, name: Any) -> None:
    if not isinstance(name, str) or not _FOLDER_NAME.fullmatch(name):
        raise RecipeError(
            f"{kind} name={name!r}; it names a folder, so use letters, digits and _ - + ., "
            "beginning with a letter or digit"
        )


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
    return recipe
