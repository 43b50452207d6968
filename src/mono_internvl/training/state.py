"""What survives a kill: weights in the released layout, optimizer, data position, recipe, versions.

A state is written to a temporary folder, forced to disk and renamed, so a folder with the right
name is whole; it is renamed again before it is deleted. The data position is the step: the order of
records is arithmetic. Everything is safetensors or JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, ProcessorMixin

from mono_internvl.compute import ComputePlan
from mono_internvl.errors import ConfigError, TrainingStateError
from mono_internvl.released.weight_files import safetensors_files
from mono_internvl.runs.folder import write_whole
from mono_internvl.runs.json_lines import read_lines
from mono_internvl.runs.provenance import commit, versions

STATE_FILE = "training_state.json"
# In the safetensors format, but not by name: engines read every `*.safetensors` beside config.json
# as weights of the model.
OPTIMIZER_FILE = "optimizer.state"
_EARLIER_OPTIMIZER_FILE = "optimizer.safetensors"  # states of version 0.1 go on from it
PLAN_FILE = "plan.json"
_DIGEST_DIGITS = 16
_STATE_NAME = re.compile(r"step_\d{8,}")
_SAMPLE_BYTES = 64  # of every tensor of the start checkpoint


@dataclass(frozen=True)
class SavedState:
    """A whole state on disk.

    Attributes:
        folder: A checkpoint in the released layout, with optimizer and position beside it.
        step: Optimizer steps taken.
        stage: The stage's fields as they were.
        inputs: Digests of what the run was begun from, by name; see `digest_of_start` and
            `digest_of_data`. A name that is not there was not known.
        skipped: Counts of records left out, see `SkipCounts`; empty if they were not kept.
    """

    folder: Path
    step: int
    stage: dict[str, Any]
    inputs: dict[str, str]
    skipped: dict[str, Any]


def save_state(
    folder: Path,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    optimizer: Optimizer | None,
    step: int,
    stage: Mapping[str, Any],
    inputs: Mapping[str, str],
    skipped: Mapping[str, Any],
) -> SavedState:
    """Write a state whole or not at all.

    Args:
        folder: Its final place; replaced if it exists.
        model: Saved in the released layout, dtype as it is.
        processor: Saved beside it, so that the folder can be chatted with.
        optimizer: None leaves it out (the end of a stage).
        step: Optimizer steps taken.
        stage: Fields of the stage, for the check at resume.
        inputs: Digests of start and data, for the same check.
        skipped: Counts of records left out so far.

    Raises:
        TrainingStateError: The disk is full or does not take it; states before this one are whole.
    """
    temporary = _hidden(folder, "new")
    shutil.rmtree(temporary, ignore_errors=True)
    made_by = {**versions(), "commit": commit()}
    state = {
        "step": step,
        "stage": dict(stage),
        "inputs": dict(inputs),
        "skipped": dict(skipped),
        "versions": made_by,
    }
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        if optimizer is not None:
            save_file(_optimizer_tensors(model, optimizer), temporary / OPTIMIZER_FILE)
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
        _force_to_disk([*temporary.rglob("*"), temporary])
        remove_state(folder)
        temporary.replace(folder)
        _force_to_disk([folder.parent])
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise TrainingStateError(
            f"{folder}: state of step {step} not written ({error}); make room on the disk and "
            "start again, the run goes on from the state before"
        ) from error
    return SavedState(folder, step, dict(stage), dict(inputs), dict(skipped))


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


def remove_state(folder: Path) -> None:
    """Delete a state so that no kill leaves half of it under its name."""
    if folder.exists():
        doomed = _hidden(folder, "old")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.replace(doomed)
        shutil.rmtree(doomed)


def sweep(run: Path) -> None:
    """Delete what kills left behind in a run folder: states half written or half deleted."""
    for folder in run.glob(".*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def _hidden(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}.tmp")


def _force_to_disk(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
            dict(state["stage"]),
            dict(state.get("inputs", {})),
            dict(state.get("skipped", {})),
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise TrainingStateError(
            f"{folder}: no readable {STATE_FILE} ({error}); delete the folder to start over"
        ) from error


def digest_of_start(folder: Path) -> str | None:
    """A short digest of the checkpoint that a run begins from; None if there is no such folder.

    Reads config.json, the headers of the weight files and the first bytes of every tensor: other
    weights of the same shape differ there, and gigabytes need not be read.

    Raises:
        CheckpointError: A weight file is missing.
        TrainingStateError: A weight file cannot be read.
    """
    if not (folder / "config.json").is_file():
        return None
    sha = hashlib.sha256((folder / "config.json").read_bytes())
    for path in safetensors_files(folder):
        try:
            with path.open("rb") as file:
                header = file.read(int.from_bytes(file.read(8), "little"))
                sha.update(f"{path.name} {path.stat().st_size}\n".encode() + header)
                ends = (info.get("data_offsets", (0, 0)) for info in json.loads(header).values())
                for begin in sorted(int(first) for first, _ in ends):
                    file.seek(8 + len(header) + begin)
                    sha.update(file.read(_SAMPLE_BYTES))
        except (OSError, OverflowError, ValueError, AttributeError, TypeError) as error:
            raise TrainingStateError(
                f"{path}: not a readable safetensors file ({error}); restore it to go on"
            ) from error
    return sha.hexdigest()[:_DIGEST_DIGITS]


def digest_of_data(meta: Path, annotations: Iterable[Path]) -> str:
    """A short digest of the records of a stage: every byte of the meta file and its annotations.

    Images are not read: of 2,000,000 records the lines are some 250 MB, which is a quarter second.
    """
    sha = hashlib.sha256(meta.read_bytes())
    for path in annotations:
        with path.open("rb") as file:
            sha.update(f"{path.name} ".encode() + hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:_DIGEST_DIGITS]


def state_folder(run: Path, step: int) -> Path:
    """Where a run keeps the state after a number of steps."""
    return run / f"step_{step:08d}"


def state_folders(run: Path) -> list[Path]:
    """The states of a run; what else is in its folder, a copy `step_00000010_mine`, is its user's.

    Raises:
        TrainingStateError: A file stands where a state has to.
    """
    found = [path for path in run.glob("step_*") if _STATE_NAME.fullmatch(path.name)]
    for path in found:
        if not path.is_dir():
            raise TrainingStateError(f"{path}: is no folder but has a state's name; move it away")
    return found


def latest_state(run: Path) -> SavedState | None:
    """The state with the most steps of a run.

    Raises:
        TrainingStateError: One of them is damaged.
    """
    states = [read_state(folder) for folder in state_folders(run)]
    return max(states, key=lambda state: state.step, default=None)


def load_optimizer(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Put saved moments back into a fresh optimizer over the same parameters.

    Raises:
        TrainingStateError: They do not belong to these parameters.
    """
    file = folder / OPTIMIZER_FILE
    if not file.exists() and (folder / _EARLIER_OPTIMIZER_FILE).exists():
        file = folder / _EARLIER_OPTIMIZER_FILE
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise TrainingStateError(
            f"{file}: not readable ({error}); delete the folder to start over"
        ) from error
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for number, parameter in enumerate(parameters):  # so does `state_dict` number them
        name = names[id(parameter)]
        state[number] = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            tensor = tensors.pop(f"{name}|{key}", None)
            if tensor is None:
                raise TrainingStateError(f"{folder}: no {key} for parameter {name}")
            if key != "step" and tensor.shape != parameter.shape:
                raise TrainingStateError(
                    f"{folder}: {key} of {name} is {tuple(tensor.shape)}, the parameter "
                    f"{tuple(parameter.shape)}; delete the folder to start over"
                )
            # A copy: what was read is a view of the file, which is deleted with the state.
            state[number][key] = tensor.clone()
    if tensors:
        raise TrainingStateError(f"{folder}: moments of unknown parameter {min(tensors)}")
    # PyTorch knows where each belongs: a fused step wants its count beside the parameter, another
    # one on the CPU.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


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


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(parameter)]}|{key}": tensor.contiguous()
        for parameter, moments in optimizer.state.items()
        for key, tensor in moments.items()
    }
