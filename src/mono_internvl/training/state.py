"""What survives a kill: weights in the released layout, optimizer, data position, recipe, versions.

A state is written to a temporary folder and renamed, so a folder with the right name is whole. The data
position is the step: the order of records is arithmetic. Everything is safetensors or JSON.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, ProcessorMixin

from mono_internvl.errors import TrainingStateError

STATE_FILE, OPTIMIZER_FILE = "training_state.json", "optimizer.safetensors"


@dataclass(frozen=True)
class SavedState:
    """A whole state on disk.

    Attributes:
        folder: A checkpoint in the released layout, with optimizer and position beside it.
        step: Optimizer steps taken.
        stage: The stage's fields as they were.
    """

    folder: Path
    step: int
    stage: dict[str, Any]


def save_state(
    folder: Path,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    optimizer: Optimizer | None,
    step: int,
    stage: Mapping[str, Any],
) -> SavedState:
    """Write a state whole or not at all.

    Args:
        folder: Its final place; replaced if it exists.
        model: Saved in the released layout, dtype as it is.
        processor: Saved beside it, so that the folder can be chatted with.
        optimizer: None leaves it out (the end of a stage).
        step: Optimizer steps taken.
        stage: Fields of the stage, for the check at resume.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    if optimizer is not None:
        save_file(_optimizer_tensors(model, optimizer), temporary / OPTIMIZER_FILE)
    state = {"step": step, "stage": dict(stage), "versions": versions()}
    (temporary / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    temporary.replace(folder)
    return SavedState(folder, step, dict(stage))


def read_state(folder: Path) -> SavedState:
    """The state in a folder.

    Raises:
        TrainingStateError: Its file is missing or damaged.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        return SavedState(folder, int(state["step"]), dict(state["stage"]))
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise TrainingStateError(
            f"{folder}: no readable {STATE_FILE} ({error}); delete the folder to start over"
        ) from error


def latest_state(run: Path) -> SavedState | None:
    """The state with the most steps among `step_*` folders of a run."""
    states = [read_state(folder) for folder in run.glob("step_*") if folder.is_dir()]
    return max(states, key=lambda state: state.step, default=None)


def load_optimizer(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Put saved moments back into a fresh optimizer over the same parameters.

    Raises:
        TrainingStateError: They do not belong to these parameters.
    """
    try:
        tensors = load_file(folder / OPTIMIZER_FILE)
    except (OSError, SafetensorError) as error:
        raise TrainingStateError(f"{folder / OPTIMIZER_FILE}: not readable ({error})") from error
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            moments = {
                key: tensors.pop(f"{name}|{key}", None) for key in ("step", "exp_avg", "exp_avg_sq")
            }
            missing = [key for key, tensor in moments.items() if tensor is None]
            if missing:
                raise TrainingStateError(f"{folder}: no {missing[0]} for parameter {name}")
            optimizer.state[parameter] = {
                key: tensor if key == "step" else tensor.to(parameter.device)
                for key, tensor in moments.items()
                if tensor is not None
            }
    if tensors:
        raise TrainingStateError(f"{folder}: moments of unknown parameter {min(tensors)}")


@contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """Hold a run folder against a second process.

    Raises:
        TrainingStateError: Another one has it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingStateError(
                f"{run}: another process trains here; wait for it or choose another output folder"
            ) from error
        yield


def truncate_metrics(path: Path, steps: int) -> None:
    """Drop the metric rows after `steps`: they were written after the state that is resumed."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= steps:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            break  # the row that the kill cut in two, and nothing after it
    path.write_text("".join(line + "\n" for line in kept))


def versions() -> dict[str, str]:
    """What made a number: package versions, Python, and the commit of a source checkout."""
    import transformers

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"]
    try:
        found["commit"] = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found["commit"] = "unknown"
    return found


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(parameter)]}|{key}": tensor.contiguous()
        for parameter, moments in optimizer.state.items()
        for key, tensor in moments.items()
    }
