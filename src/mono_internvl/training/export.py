"""A training run becomes a checkpoint in the released layout, whether or not it is finished."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from mono_internvl.errors import CheckpointError, ConfigError
from mono_internvl.runs.folder import new_folder
from mono_internvl.training.checkpointing import load_checkpoint
from mono_internvl.training.state import STATE_FILE, SavedState, read_state
from mono_internvl.training.state_folders import StateFolders, state_folders

ExportDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        out: The checkpoint.
        source: The state, or finished stage, it was made of.
        stage: Name of the stage.
        step: Optimizer steps it had taken.
        of: Steps of the whole stage.
    """

    out: Path
    source: Path
    stage: str
    step: int
    of: int


def export(
    run: Path, out: Path, *, step: int | None = None, dtype: ExportDtype = "float32"
) -> Exported:
    """Write weights, configuration and processor of a run in the released layout.

    Args:
        run: Folder of a run, of one of its stages, or of a state of one. Of several stages the one
            that was written last is taken, of a stage what was trained longest.
        out: New folder.
        step: Take the state after so many steps of the stage.
        dtype: Of the weights; training keeps them in float32, released ones are bfloat16.

    Raises:
        CheckpointError: There is nothing to export, or `out` is in use or cannot be written.
        ConfigError: No such dtype.
        TrainingStateError: The state is damaged.
    """
    if dtype not in get_args(ExportDtype):
        raise ConfigError(f"dtype={dtype!r}; expected one of {', '.join(get_args(ExportDtype))}")
    if out.exists():
        raise CheckpointError(f"{out}: is there already; give a new folder, nothing is overwritten")
    saved = _choose(run, step)
    if saved.files is None:
        model, processor = load_checkpoint(saved.folder, "sdpa")
    else:
        model, processor = StateFolders(saved.folder.parent).load_model(saved, "sdpa")
    model = model.to(getattr(torch, dtype))
    with new_folder(out) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    stage = saved.stage
    return Exported(out, saved.folder, str(stage["name"]), saved.step, int(stage["steps"]))


def _choose(run: Path, step: int | None) -> SavedState:
    """The state that is meant by a folder and a step."""
    if (run / STATE_FILE).is_file():
        found = [run]
    else:
        of_stages = [_states(run), *(_states(path) for path in sorted(run.glob("*/")))]
        candidates = [states for states in of_stages if states]
        if not candidates:
            raise CheckpointError(
                f"{run}: neither a finished stage nor a saved state in it; give the folder of a "
                "run, of a stage or of a state"
            )
        found = max(candidates, key=lambda states: max(_written(path) for path in states))
    states = [read_state(path) for path in found]
    if step is not None:
        states = [state for state in states if state.step == step]
    if not states:
        steps = ", ".join(str(read_state(path).step) for path in found)
        raise CheckpointError(f"{run}: no state of step {step}; there are those of {steps}")
    return max(states, key=lambda state: state.step)


def _states(stage: Path) -> list[Path]:
    finished = stage / "checkpoint"
    return [*state_folders(stage), *([finished] if (finished / STATE_FILE).is_file() else [])]


def _written(state: Path) -> float:
    return (state / STATE_FILE).stat().st_mtime
