"""Where the states of a running stage are kept, behind one protocol; today's way: folders.

A state is written to a temporary folder, forced to disk and renamed, so a folder with the right
name is whole; it is renamed again before it is deleted. The data position is the step: the order of
records is arithmetic. Everything is safetensors or JSON.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from mono_internvl.distributed import rank
from mono_internvl.errors import TrainingStateError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.runs.provenance import commit, versions
from mono_internvl.training.objectives.objective import State
from mono_internvl.training.state import STATE_FILE, SavedState, read_state

# In the safetensors format, but not by name: engines read every `*.safetensors` beside config.json
# as weights of the model.
OPTIMIZER_FILE = "optimizer.state"
OBJECTIVE_FILE = "objective.state"
_EARLIER_OPTIMIZER_FILE = "optimizer.safetensors"  # states of version 0.1 go on from it
_STATE_NAME = re.compile(r"step_\d{8,}")

ModelAndProcessor = tuple[MonoInternVLForConditionalGeneration, MonoInternVLProcessor]


@dataclass(frozen=True)
class RunState:
    """Everything that a run needs to go on.

    Attributes:
        model: Saved in the released layout, dtype as it is.
        processor: Saved beside it, so that the folder can be chatted with.
        optimizer: None at the end of a stage; then the objective's state is left out, too.
        objective: What the objective carries from step to step.
        step: Optimizer steps taken; the data position.
        stage: Fields of the stage, for the check at resume.
        inputs: Digests of start and data, for the same check.
        skipped: Counts of records left out so far.
    """

    model: MonoInternVLForConditionalGeneration
    processor: MonoInternVLProcessor
    optimizer: Optimizer | None
    objective: State
    step: int
    stage: Mapping[str, Any]
    inputs: Mapping[str, str]
    skipped: Mapping[str, Any]


class Checkpointing(Protocol):
    """Where the states of a stage are kept while it runs; made of the run's folder.

    Every method is called in all processes alike. The finished stage is none of its states: that is
    a checkpoint in the released layout, whoever keeps the states.
    """

    def latest(self) -> SavedState | None:
        """What the last whole state says, without its tensors; None before the first."""
        ...

    def load_model(self, saved: SavedState, attention: str) -> ModelAndProcessor:
        """The model, in fp32 on the CPU, and the processor of a state."""
        ...

    def restore(
        self, saved: SavedState, model: nn.Module, optimizer: Optimizer, objective: State
    ) -> State:
        """Put saved moments into a fresh optimizer over the model's parameters.

        Args:
            saved: The state.
            model: As `load_model` gave it.
            optimizer: Changed in place.
            objective: The objective's initial state: names and shapes of what was saved.

        Returns:
            The objective's state as it was saved.
        """
        ...

    def save(self, state: RunState) -> None:
        """Keep a state, whole or not at all; those before it may go once it is whole."""
        ...

    def clear(self) -> None:
        """Delete all states: the stage is finished."""
        ...


class StateFolders:
    """The latest state as `step_*/` in the run's folder, written by the first process.

    Args:
        run: The folder.
    """

    def __init__(self, run: Path) -> None:
        self.run = run

    def latest(self) -> SavedState | None:
        """See `Checkpointing`.

        Raises:
            TrainingStateError: A state is damaged, or a file stands where a state has to.
        """
        states = [read_state(folder) for folder in self._folders()]
        return max(states, key=lambda state: state.step, default=None)

    def load_model(self, saved: SavedState, attention: str) -> ModelAndProcessor:
        """See `Checkpointing`."""
        model, processor = load_checkpoint(saved.folder, attention)
        # Weights that are views of files: a state is deleted while its weights are used.
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.clone()
        return model, processor

    def restore(
        self, saved: SavedState, model: nn.Module, optimizer: Optimizer, objective: State
    ) -> State:
        """See `Checkpointing`.

        Raises:
            TrainingStateError: What was saved is not of this optimizer and objective.
        """
        load_optimizer(saved.folder, model, optimizer)
        return _load_objective(saved.folder, objective) if objective else objective

    def save(self, state: RunState) -> None:
        """See `Checkpointing`.

        Raises:
            TrainingStateError: The disk is full; the state before this one is whole.
        """
        folder = self.run / f"step_{state.step:08d}"
        if rank() == 0:
            save_state(folder, state)
            self._remove_but(folder)

    def clear(self) -> None:
        """See `Checkpointing`."""
        if rank() == 0:
            self._remove_but(None)

    def _folders(self) -> list[Path]:
        # What else is in the folder, a copy `step_00000010_mine`, is its user's.
        found = [path for path in self.run.glob("step_*") if _STATE_NAME.fullmatch(path.name)]
        for path in found:
            if not path.is_dir():
                raise TrainingStateError(
                    f"{path}: is no folder but has a state's name; move it away"
                )
        return found

    def _remove_but(self, kept: Path | None) -> None:
        for folder in self._folders():
            if folder != kept:
                remove_state(folder)


def load_checkpoint(folder: Path, attention: str) -> ModelAndProcessor:
    """The fp32 model and the processor of a checkpoint (a folder or hub id)."""
    model = MonoInternVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    return model, MonoInternVLProcessor.from_pretrained(folder)


def save_state(folder: Path, state: RunState) -> None:
    """Write a state whole or not at all; one of the same name is replaced.

    Raises:
        TrainingStateError: The disk is full or does not take it; states before this one are whole.
    """
    temporary = _hidden(folder, "new")
    shutil.rmtree(temporary, ignore_errors=True)
    said = {
        "step": state.step,
        "stage": dict(state.stage),
        "inputs": dict(state.inputs),
        "skipped": dict(state.skipped),
        "versions": {**versions(), "commit": commit()},
    }
    try:
        temporary.mkdir(parents=True)
        state.model.save_pretrained(temporary)
        state.processor.save_pretrained(temporary)
        if state.optimizer is not None:
            moments = _optimizer_tensors(state.model, state.optimizer)
            save_file(moments, temporary / OPTIMIZER_FILE)
            if state.objective:
                save_file(dict(state.objective), temporary / OBJECTIVE_FILE)
        (temporary / STATE_FILE).write_text(json.dumps(said, indent=2) + "\n")
        _force_to_disk([*temporary.rglob("*"), temporary])
        remove_state(folder)
        temporary.replace(folder)
        _force_to_disk([folder.parent])
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise TrainingStateError(
            f"{folder}: state of step {state.step} not written ({error}); make room on the disk "
            "and start again, the run goes on from the state before"
        ) from error


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


def load_optimizer(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Put saved moments back into a fresh optimizer over the same parameters.

    Raises:
        TrainingStateError: They do not belong to these parameters.
    """
    file = folder / OPTIMIZER_FILE
    if not file.exists() and (folder / _EARLIER_OPTIMIZER_FILE).exists():
        file = folder / _EARLIER_OPTIMIZER_FILE
    tensors = _read_tensors(file)
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(parameters):  # so does `state_dict` number them
        name = names[id(parameter)]
        state[index] = {}
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
            state[index][key] = tensor.clone()
    if tensors:
        raise TrainingStateError(f"{folder}: moments of unknown parameter {min(tensors)}")
    # PyTorch knows where each belongs: a fused step wants its count beside the parameter, another
    # one on the CPU.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _load_objective(folder: Path, initial: State) -> State:
    saved = _read_tensors(folder / OBJECTIVE_FILE)
    shapes, expected = ({n: tuple(t.shape) for n, t in s.items()} for s in (saved, initial))
    if shapes != expected:
        raise TrainingStateError(
            f"{folder / OBJECTIVE_FILE}: holds {shapes}, the objective carries {expected}; delete "
            "the folder to start over"
        )
    # Copies: what was read are views of the file, which is deleted with the state.
    return {name: tensor.clone() for name, tensor in saved.items()}


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise TrainingStateError(
            f"{file}: not readable ({error}); delete the folder to start over"
        ) from error


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(parameter)]}|{key}": tensor.contiguous()
        for parameter, moments in optimizer.state.items()
        for key, tensor in moments.items()
    }
