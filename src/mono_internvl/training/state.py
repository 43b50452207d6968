"""What a run folder says of its run: states by today's names, plan, metrics, digests of inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mono_internvl.compute import ComputePlan
from mono_internvl.data.sources import Source
from mono_internvl.errors import ConfigError, TrainingStateError
from mono_internvl.runs.folder import write_whole
from mono_internvl.runs.json_lines import read_lines
from mono_internvl.training.recipe import current_names

STATE_FILE = "training_state.json"
PLAN_FILE = "plan.json"
_DIGEST_DIGITS = 16
_LATER_FIELDS: dict[str, Any] = {
    "recompute": "none",
    "objective": {"name": "next_token"},
    "packing": "none",
    "packed_tokens": 8192,
    "decoding": "exact",
    "compiling": "none",
}
"""Fields of a stage that are younger than the first states, with what held before."""
_MAY_CHANGE = {
    *("title", "max_skipped_ratio", "loader_workers", "keep_last", "keep_every"),
    *("on_bad_step", "max_loss_ratio"),
}
"""Fields of a stage that do not change what it computes: a run may go on with others."""


@dataclass(frozen=True)
class SavedState:
    """A whole state, as it speaks of itself.

    Attributes:
        folder: Where it is.
        step: Optimizer steps taken.
        stage: The stage's fields as they were, under today's names.
        inputs: Digests of what the run was begun from, by name; see `digest_of_checkpoint`
            and `digest_of_data`. A name that is not there was not known.
        skipped: Counts of records left out, see `SkipCounts`; empty if they were not kept.
        guard: What told bad steps from good ones, see `StepGuard`; empty if it was not kept.
        files: Bytes of its other files, by name; None of states in an earlier layout.
    """

    folder: Path
    step: int
    stage: dict[str, Any]
    inputs: dict[str, str]
    skipped: dict[str, Any]
    files: dict[str, int] | None = None
    guard: dict[str, Any] = field(default_factory=dict)


def keep_plan(run: Path, plan: ComputePlan, asked: str) -> ComputePlan:
    """Write a run folder's plan down; a run that goes on keeps the precision it began with.

    Args:
        run: Its folder; states one or two levels below count where no plan was written.
        plan: Of this machine.
        asked: The precision as it was asked for.

    Returns:
        The plan, in the precision of the run.

    Raises:
        ConfigError: Another precision than the run's was asked for, or its plan is damaged.
        TrainingStateError: A state is there and cannot be read.
    """
    begun = _begun_precision(run)
    if begun is not None and asked not in ("auto", begun):
        raise ConfigError(
            f"{run}: begun with precision={begun!r}, asked for {asked!r}; leave it out, choose "
            "another output folder or delete this one"
        )
    plan = plan.with_precision(begun or plan.precision)
    write_whole(run / PLAN_FILE, json.dumps(plan.to_dict(), indent=2))
    return plan


def _begun_precision(run: Path) -> str | None:
    file = run / PLAN_FILE
    if file.exists():
        try:
            return str(json.loads(file.read_text(encoding="utf-8"))["precision"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file}: not a plan ({error!r}); delete it") from error
    files = sorted([*run.glob(f"*/{STATE_FILE}"), *run.glob(f"*/*/{STATE_FILE}")])
    states = [read_state(file.parent) for file in files if not file.parent.name.startswith(".")]
    return next((str(s.stage["precision"]) for s in states if "precision" in s.stage), None)


def read_state(folder: Path) -> SavedState:
    """The state in a folder.

    Raises:
        TrainingStateError: Its file is missing or damaged.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        if int(state["step"]) < 0:
            raise ValueError(f"step {state['step']}")
        return SavedState(
            folder,
            int(state["step"]),
            {**_LATER_FIELDS, **current_names(dict(state["stage"]))},
            dict(state.get("inputs", {})),
            dict(state.get("skipped", {})),
            dict(state["files"]) if "files" in state else None,
            dict(state.get("guard", {})),
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise TrainingStateError(
            f"{folder}: no readable {STATE_FILE} ({error}); delete the folder to start over"
        ) from error


def check_resumable(
    state: SavedState, run: Path, stage: Mapping[str, Any], inputs: Mapping[str, str]
) -> None:
    """Hold a stage to the state that its run would go on from.

    Args:
        state: Found in the run's folder.
        run: The folder.
        stage: Fields of the stage that is to be trained, as they would be saved.
        inputs: Digests of what it would begin from.

    Raises:
        TrainingStateError: The state is of another stage, or was begun from something else.
    """
    for name in sorted((set(state.stage) | set(stage)) - _MAY_CHANGE):
        if state.stage.get(name) != stage.get(name):
            raise TrainingStateError(
                f"{run}: holds a run with {name}={state.stage.get(name)!r}, this stage has "
                f"{stage.get(name)!r}; choose another output folder or delete this one"
            )
    if state.step > stage["steps"]:
        raise TrainingStateError(
            f"{state.folder}: a state after {state.step} steps of a stage of {stage['steps']}; "
            "delete it to go on from an earlier one, or to start over"
        )
    for name, digest in inputs.items():
        if state.inputs.get(name, digest) != digest:
            raise TrainingStateError(
                f"{run}: holds a run begun with another {name} (digest {state.inputs[name]}, now "
                f"{digest}); restore it, choose another output folder or delete this one"
            )


def digest_of_data(meta: Path, sources: Iterable[Source]) -> str:
    """A short digest of the records of a stage: the meta file and what its sources are known by."""
    sha = hashlib.sha256(meta.read_bytes())
    for source in sources:
        sha.update(source.fingerprint())
    return sha.hexdigest()[:_DIGEST_DIGITS]


def truncate_metrics(path: Path, steps: int) -> None:
    """Drop the metric rows after `steps`: they were written after the state that is resumed.

    Raises:
        TrainingStateError: The file is damaged by more than a last row that is cut in two.
    """
    if not path.exists():
        return
    kept = []
    try:
        for line in read_lines(path):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break  # the row that the kill cut in two, and nothing after it
            if row["step"] <= steps:
                kept.append(line)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingStateError(
            f"{path}: no rows of a run ({error!r}); restore it, or move it away to go on without"
        ) from error
    if kept:
        write_whole(path, "\n".join(kept))
    else:
        path.unlink()
