"""What a person sees while a stage trains: loss, speed and time left, live on a terminal."""

from __future__ import annotations

import datetime
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mono_internvl.training.recipe import PublishedData, Recipe, Stage

_SMOOTHING = 0.95
_RUN: ContextVar[str] = ContextVar("run", default="")


@contextmanager
def lines_of(run: str) -> Iterator[None]:
    """Within, progress is lines that begin with a name: several runs can share a screen.

    Args:
        run: Its name.
    """
    token = _RUN.set(f"{run}  ")
    try:
        yield
    finally:
        _RUN.reset(token)


def describe_recipe(recipe: Recipe) -> str:
    """The recipe as a person reads it before a run: every stage, and what is trainable in it."""
    lines = [f"recipe {recipe.name} ({recipe.source})", *_describe_origin(recipe)]
    for stage in recipe.stages:
        length = f"{stage.steps} steps" if stage.steps else f"{stage.epochs:g} epochs"
        lines.append(
            f"  {stage.name}  {stage.title}: {length} of {stage.batch_size} samples from "
            f"{stage.data}, {stage.schedule} rate, {stage.precision}, {stage.objective.name}"
        )
        for rule in stage.rules:
            rate = "frozen" if rule.learning_rate is None else f"{rule.learning_rate:g}"
            lines.append(f"      {rate:>8}  {rule.pattern}")
        for part in recipe.published_data:
            if part.stage == stage.name:
                lines.append(f"      published  {_describe_data(part)}")
    return "\n".join(lines)


def summarize_recipe(recipe: Recipe) -> str:
    """The recipe in a list of several: where it is from, and its stages by title."""
    stages = [f"  {stage.name:<10} {stage.title}" for stage in recipe.stages]
    return "\n".join((f"{recipe.name}: {recipe.source}", *_describe_origin(recipe), *stages))


def _describe_origin(recipe: Recipe) -> list[str]:
    """Lines that say what to know of a recipe, and what in it is of our own choice."""
    notes = [f"  note: {note}" for note in recipe.notes]
    return [*notes, *(f"  ours: {choice}" for choice in recipe.ours)]


def _describe_data(part: PublishedData) -> str:
    ratio = "" if part.ratio is None else f" ({100 * part.ratio:g} %)"
    prompt = "" if part.prompt is None else f'; asked "{part.prompt}"'
    return f"{part.task}{ratio}: {', '.join(part.datasets)}{prompt}"


class StageProgress:
    """Live line of a stage; on a pipe and in `lines_of`, a line for every tenth of the way.

    Args:
        stage: What trains.
        first_step: Where it starts (a resumed run does not start at 0).
        quiet: Show nothing (all processes but the first).
    """

    def __init__(self, stage: Stage, first_step: int = 0, quiet: bool = False):
        self.stage, self.first, self.done, self.quiet = stage, first_step, first_step, quiet
        self.console = Console(file=sys.stderr)
        self.run = _RUN.get()
        self.is_live = self.console.is_terminal and not self.run
        self.loss: float | None = None
        self.tokens = self.images = self.skipped = self.bad_steps = 0
        self.began = time.perf_counter()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.is_live,
        )
        self.task = self.bar.add_task(
            f"{stage.name} {stage.title}", total=stage.steps, completed=first_step, text=""
        )

    def __enter__(self) -> StageProgress:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def update(self, row: dict[str, Any]) -> None:
        """Show a metrics row."""
        loss = row["loss"]
        if "bad_step" in row:
            self.bad_steps += 1
        elif self.loss is None:
            self.loss = loss
        else:
            self.loss = _SMOOTHING * self.loss + (1 - _SMOOTHING) * loss
        self.tokens, self.images = self.tokens + row["tokens"], self.images + row["images"]
        self.skipped += row["skipped"]
        self.done = row["step"]
        seconds = max(1e-9, time.perf_counter() - self.began)
        loss = math.nan if self.loss is None else self.loss
        text = (
            f"loss {loss:.3f}  {self.tokens / seconds:,.0f} tokens/s  "
            f"{self.images / seconds:,.0f} images/s"
        )
        if not self.is_live and self.done < self.stage.steps:
            left = seconds * (self.stage.steps - self.done) / max(1, self.done - self.first)
            text += f"  {datetime.timedelta(seconds=round(left))} left"
        if self.skipped:
            text += f"  {self.skipped:,} skipped"
        if self.bad_steps:
            text += f"  {self.bad_steps:,} bad steps"
        self.bar.update(self.task, completed=self.done, text=text)
        tenth = max(1, self.stage.steps // 10)
        if not self.quiet and not self.is_live and self.done % tenth == 0:
            self.console.print(
                f"{self.run}{self.stage.name} {self.done}/{self.stage.steps}  {text}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
