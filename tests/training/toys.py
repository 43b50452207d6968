"""Second implementations of what the loop leaves open; top-level, so that processes find them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mono_internvl.data.batches import Batch
from mono_internvl.distributed import all_sum, world_size
from mono_internvl.training.checkpointing import ModelAndProcessor, RunState
from mono_internvl.training.loop import train_stage
from mono_internvl.training.objectives.objective import Objective, State
from mono_internvl.training.recipe import Stage
from mono_internvl.training.state import SavedState


@dataclass(frozen=True)
class SteadyLogits(Objective):
    """Next token, and log-sum-exps that stay near their running mean and near a reference's."""

    weight: float = 0.1
    reference_weight: float = 0.0
    name: str = field(default="steady_logits", init=False)

    @property
    def needs_reference(self) -> bool:
        return self.reference_weight > 0

    def initial_state(self) -> State:
        return {"mean": torch.zeros(()), "steps": torch.zeros(1, dtype=torch.int64)}

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        denominator: Tensor,
        state: State,
        reference: nn.Module | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = {"input_ids": batch.input_ids, "pixel_values": batch.pixel_values}
        logits = model(**inputs).logits[:, :-1]
        weight = batch.loss_weight[:, 1:] / denominator
        labels = batch.labels[:, 1:]
        entropy = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        z = logits.logsumexp(-1)
        unsteady = (weight * (z - state["mean"]).square()).sum()
        away = z.new_zeros(())
        if reference is not None:
            with torch.no_grad():
                there = reference(**inputs).logits[:, :-1].logsumexp(-1)
            away = (weight * (z - there).square()).sum()
        loss = (weight * entropy).sum() + self.weight * unsteady + self.reference_weight * away
        logged = {"z": (weight * z).sum(), "unsteady": unsteady, "away": away}
        return loss, {name: value.detach() for name, value in logged.items()}

    def next_state(self, state: State, scalars: Mapping[str, float]) -> State:
        return {"mean": 0.8 * state["mean"] + 0.2 * scalars["z"], "steps": state["steps"] + 1}


class InMemory:
    """States in the memory of this process."""

    kept: ClassVar[dict[Path, Any]] = {}

    def __init__(self, run: Path) -> None:
        self.run = run

    def latest(self) -> SavedState | None:
        return self.kept[self.run]["said"] if self.run in self.kept else None

    def load_model(self, saved: SavedState, attention: str) -> ModelAndProcessor:
        return copy.deepcopy(self.kept[self.run]["model"]), self.kept[self.run]["processor"]

    def restore(
        self, saved: SavedState, model: nn.Module, optimizer: torch.optim.Optimizer, initial: State
    ) -> State:
        optimizer.load_state_dict(copy.deepcopy(self.kept[self.run]["moments"]))
        return dict(self.kept[self.run]["objective"])

    def save(self, state: RunState) -> None:
        assert state.optimizer is not None
        said = (state.step, dict(state.stage), dict(state.inputs), dict(state.skipped))
        self.kept[self.run] = {
            "said": SavedState(Path("memory"), *said),
            "model": copy.deepcopy(state.model),
            "processor": state.processor,
            "moments": copy.deepcopy(state.optimizer.state_dict()),
            "objective": dict(state.objective),
        }

    def wait(self) -> None:
        pass

    def clear(self) -> None:
        self.kept.pop(self.run, None)


class MeanByHook:
    """Gradients are averaged parameter by parameter; all processes must use the same ones."""

    def __init__(self) -> None:
        self.is_waiting = False

    def wrap(self, module: nn.Module) -> nn.Module:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._average)
        return module

    def _average(self, parameter: Tensor) -> None:
        if not self.is_waiting and parameter.grad is not None:
            all_sum(parameter.grad.div_(world_size()))

    @contextmanager
    def no_sync(self, wrapped: nn.Module) -> Iterator[None]:
        self.is_waiting = True
        yield
        self.is_waiting = False

    def all_sum(self, values: Tensor) -> Tensor:
        return all_sum(values)


def train_by_hook(stage: Stage, start: Path, data: Path, run: Path) -> None:
    """Train a stage with `MeanByHook`."""
    train_stage(stage, start, data, run, parallelism=MeanByHook())
