"""`mono-internvl train`: a recipe, stage after stage, in one process or several."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mono_internvl.compute import ComputePlan, choose_device, make_plan
from mono_internvl.distributed import rank, run_processes, world_size
from mono_internvl.errors import RecipeError
from mono_internvl.released.weight_files import read_headers, resolve_checkpoint
from mono_internvl.runs.folder import exclusive, resumable
from mono_internvl.training.loop import train_stage
from mono_internvl.training.parallel import Parallel
from mono_internvl.training.progress import describe_recipe
from mono_internvl.training.recipe import Recipe, Stage, current_names
from mono_internvl.training.state import keep_plan
from mono_internvl.training.watching import Watch, check_watch

_NOT_AS_TEXT = {"name", "rules", "objective", "betas"}
"""Fields of a stage that no command line sets."""


def train(
    recipe: Recipe,
    *,
    start: str | None = None,
    data: Path | None = None,
    run: Path | None = None,
    processes: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    precision: str = "auto",
    attention: str | None = None,
    parallel: Parallel = "ddp",
    watch: Sequence[Watch] = (),
    overrides: Mapping[str, str] | None = None,
) -> Path:
    """Train all stages of a recipe; a second call goes on where the first one stopped.

    Args:
        recipe: What is trained (`load_recipe` finds one by name or in a Python file).
        start: Checkpoint folder or hub id to start from; the recipe's own unless given.
        data: Folder of the stages' meta files, or the meta file of a recipe with one stage.
        run: Output folder, `runs/<recipe>` unless given; a folder per stage.
        processes: On this machine; as many as it has cores for, and the batch divides among,
            unless given. Under `torchrun` leave it out.
        threads: Of each process; the cores left to each unless given.
        device: "auto", "cpu", "cuda" or "xpu" (one for each process), "mps", or "cuda:1".
        precision: "bf16" or "fp32" for every stage; "auto" leaves it to each stage, whose "auto" is
            what this machine multiplies faster. A run that goes on keeps what it began with.
        attention: Attention implementation; the plan's unless given.
        parallel: "ddp" (every process holds the whole model), "fsdp" (its share of it) or
            "fsdp_offload" (the same in host memory). A run may go on with another.
        watch: Who is told of every step beside `metrics.jsonl`: "tensorboard", "wandb".
        overrides: Fields of every stage as text, e.g. `{"steps": "200"}`.

    Returns:
        The last checkpoint.

    Raises:
        RecipeError: A field or its combination with the arguments is wrong.
        ConfigError: There is no such device, or the run was begun in another precision.
    """
    choose_device(device)
    if parallel not in typing.get_args(Parallel):
        known = ", ".join(typing.get_args(Parallel))
        raise RecipeError(f"--parallel {parallel}: expected one of {known}")
    check_watch(watch)
    plan = override(recipe, overrides or {})
    if precision != "auto":
        plan = override(plan, {"precision": precision})
    if data is not None and data.suffix == ".json":
        if len(plan.stages) > 1:
            raise RecipeError(
                f"--data {data}: one meta file for the {len(plan.stages)} stages of {plan.name!r}; "
                f"give the folder that holds {', '.join(stage.data for stage in plan.stages)}"
            )
        plan = override(plan, {"data": data.name})
        data = data.parent
    if data is None:
        raise RecipeError(f"recipe {plan.name!r} needs data: give --data META.json or a folder")
    source = start or plan.start
    if source is None:
        raise RecipeError(f"recipe {plan.name!r} names no checkpoint to start from: give --model")
    folder = run or Path("runs") / plan.name
    first = resolve_checkpoint(source)
    is_shared_out = int(os.environ.get("WORLD_SIZE", "1")) > 1  # by torchrun
    named = {stage.precision for stage in plan.stages}
    asked = named.pop() if len(named) == 1 else "auto"
    compute = make_plan(
        device,
        asked,
        attention=attention,
        threads=threads,
        processes=1 if is_shared_out and processes is None else processes,
        batch_size=math.gcd(*(stage.batch_size // stage.accumulation for stage in plan.stages)),
        process_bytes=_training_bytes(first),
    )
    if os.environ.get("RANK", "0") == "0":
        with exclusive(folder):  # before processes are started: it can be written to
            compute = keep_plan(folder, compute, asked)
    arguments = (plan, first, data, folder, compute, parallel, tuple(watch))
    with resumable(folder):
        run_processes(train_stages, compute.processes, *arguments, threads=compute.threads)
    return folder / plan.stages[-1].name / "checkpoint"


def _training_bytes(checkpoint: Path) -> int:
    """Weights, gradients and two moments in fp32."""
    headers = read_headers(checkpoint).values()
    return sum(16 * math.prod(header.shape) for header in headers)


def train_stages(
    recipe: Recipe,
    start: Path,
    data: Path,
    run: Path,
    compute: ComputePlan,
    parallel: Parallel = "ddp",
    watch: Sequence[Watch] = (),
) -> None:
    """In every process: recipe and plan are printed, then the stages are trained in order."""
    if rank() == 0:
        shared = f", {parallel} over {world_size()}" if world_size() > 1 else ""
        said = f"{describe_recipe(recipe)}\n{compute.describe()}{shared}"
        Console(highlight=False).print(said, markup=False, soft_wrap=True)
    for stage in recipe.stages:
        result = train_stage(
            stage,
            start,
            data,
            run / stage.name,
            device=compute.device,
            plan=compute,
            parallel=parallel,
            watch=watch,
        )
        start = result.checkpoint
    if rank() == 0:
        (run / "recipe.json").write_text(json.dumps(recipe.to_dict(), indent=2) + "\n")


def override(recipe: Recipe, fields: Mapping[str, str]) -> Recipe:
    """The recipe with fields of all its stages replaced, each parsed as the field's type.

    Raises:
        RecipeError: No such field, or a value that is not of its type.
    """
    types = typing.get_type_hints(Stage)
    values: dict[str, Any] = {}
    for name, text in current_names(fields).items():
        if name not in types or name in _NOT_AS_TEXT:
            known = ", ".join(sorted(set(types) - _NOT_AS_TEXT))
            raise RecipeError(f"--set {name}={text}: no such field; known: {known}")
        kind = types[name] if types[name] in (int, float) else str
        try:
            values[name] = kind(text)
        except ValueError as error:
            raise RecipeError(f"--set {name}={text}: expected {kind.__name__}") from error
        choices = typing.get_args(types[name])
        if choices and values[name] not in choices:
            raise RecipeError(f"--set {name}={text}: expected one of {', '.join(choices)}")
    stages = tuple(dataclasses.replace(stage, **values) for stage in recipe.stages)
    return dataclasses.replace(recipe, stages=stages)
