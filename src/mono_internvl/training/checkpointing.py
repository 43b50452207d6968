"""Where the states of a running stage are kept, behind one protocol, and what a stage ends with.

States of a running stage are sharded folders (`state_folders`); the finished stage is a checkpoint
in the released layout, written here. Everything is safetensors or JSON.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import Optimizer

from mono_internvl.distributed import rank, world_size
from mono_internvl.errors import TrainingStateError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.runs.provenance import commit, versions
from mono_internvl.training.objectives.objective import State
from mono_internvl.training.state import STATE_FILE, SavedState

ModelAndProcessor = tuple[MonoInternVLForConditionalGeneration, MonoInternVLProcessor]


@dataclass(frozen=True)
class RunState:
    """Everything that a run needs to go on.

    Attributes:
        model: Its parameters may be shards, one of each in every process.
        processor: Saved beside it.
        optimizer: Its moments; None at the end of a stage.
        objective: What the objective carries from step to step.
        step: Optimizer steps taken; the data position.
        stage: Fields of the stage, for the check at resume.
        inputs: Digests of start and data, for the same check.
        skipped: Counts of records left out so far.
        guard: What tells bad steps from good ones.
    """

    model: MonoInternVLForConditionalGeneration
    processor: MonoInternVLProcessor
    optimizer: Optimizer | None
    objective: State
    step: int
    stage: Mapping[str, Any]
    inputs: Mapping[str, str]
    skipped: Mapping[str, Any]
    guard: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """What a state says of itself, as plain data."""
        return {
            "step": self.step,
            "stage": dict(self.stage),
            "inputs": dict(self.inputs),
            "skipped": dict(self.skipped),
            "guard": dict(self.guard),
            "processes": world_size(),
            "versions": {**versions(), "commit": commit()},
        }


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
            model: As `load_model` gave it; its parameters may be shared out meanwhile.
            optimizer: Changed in place.
            objective: The objective's initial state: names and shapes of what was saved.

        Returns:
            The objective's state as it was saved.
        """
        ...

    def save(self, state: RunState) -> None:
        """Keep a state, whole or not at all; those before it may go once it is whole.

        It may be written while training goes on: what went wrong is then raised by the next call.
        """
        ...

    def wait(self) -> None:
        """Come back when what was saved last is whole."""
        ...

    def clear(self) -> None:
        """Delete the states that nobody asked to keep: the stage is finished."""
        ...


def load_checkpoint(folder: Path, attention: str) -> ModelAndProcessor:
    """The fp32 model and the processor of a checkpoint (a folder or hub id)."""
    model = MonoInternVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    return model, MonoInternVLProcessor.from_pretrained(folder)


def save_finished(folder: Path, state: RunState) -> None:
    """Write a stage's checkpoint in the released layout, whole or not at all; called by all alike.

    Raises:
        TrainingStateError: The disk is full or does not take it; states before this one are whole.
    """
    weights = None
    if world_size() > 1:  # gathered, to the first process alone
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(state.model, options=options)
    if rank() > 0:
        return
    temporary = hidden(folder, "new")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        state.model.save_pretrained(temporary, state_dict=weights)
        state.processor.save_pretrained(temporary)
        make_whole(temporary, folder, state.to_dict())
    except (OSError, SafetensorError, TrainingStateError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise not_written(folder, state.step, error) from error


def make_whole(temporary: Path, folder: Path, said: Mapping[str, Any]) -> None:
    """Give a written state its name, with what it says of itself; one of that name is replaced.

    Raises:
        OSError: The disk is full.
    """
    (temporary / STATE_FILE).write_text(json.dumps(said, indent=2) + "\n")
    _force_to_disk([*temporary.rglob("*"), temporary])
    remove_state(folder)
    temporary.replace(folder)
    _force_to_disk([folder.parent])


def not_written(folder: Path, step: int, error: BaseException) -> TrainingStateError:
    """What to raise of a state that was not written."""
    said = " ".join(str(error).split())[-300:]
    return TrainingStateError(
        f"{folder}: state of step {step} not written ({said}); make room on the disk and start "
        "again, the run goes on from the state before"
    )


def remove_state(folder: Path) -> None:
    """Delete a state so that no kill leaves half of it under its name."""
    if folder.exists():
        doomed = hidden(folder, "old")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.replace(doomed)
        shutil.rmtree(doomed)


def sweep(run: Path) -> None:
    """Delete what kills left behind in a run folder: states half written or half deleted."""
    for folder in run.glob(".*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def hidden(folder: Path, what: str) -> Path:
    """Where a state is before it has its name ("new"), or after ("old")."""
    return folder.with_name(f".{folder.name}.{what}.tmp")


def _force_to_disk(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
