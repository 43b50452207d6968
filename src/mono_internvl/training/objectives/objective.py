"""What a stage minimises, as data in its recipe; and the module that the loop differentiates.

Legend: B samples, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mono_internvl.data.batches import Batch

State = Mapping[str, Tensor]
"""What an objective carries from step to step, by name: saved with the weights, and restored."""


@runtime_checkable
class Objective(Protocol):
    """An objective of training; implemented by a frozen dataclass, so that a stage can name it.

    Its fields are its numbers; they are saved with the stage and compared when a run resumes. It
    holds no tensor: its state is passed in. Subclass it for "no state, no reference".

    Attributes:
        name: Tells its fields in a saved state from those of another objective.
    """

    name: str

    @property
    def needs_reference(self) -> bool:
        """Whether the model that the stage starts from is kept beside it, frozen."""
        return False

    @property
    def reads_pairs(self) -> bool:
        """Whether its batches hold pairs, see `Batch.num_pairs`."""
        return False

    def initial_state(self) -> State:
        """The state before the first step: CPU tensors; empty if there is none."""
        return {}

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        denominator: Tensor,
        state: State,
        reference: nn.Module | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, and what is logged beside it.

        Both are sums over the micro-batch over `denominator`: the loop adds them up over the
        micro-batches of a step and takes the mean over processes.

        Args:
            model: The one that is trained.
            batch: On the model's device.
            denominator: Weight of the labels of the whole step, over the number of processes.
            state: As it was before this step, alike in every process.
            reference: Frozen, in evaluation mode; None unless it is needed.

        Returns:
            The loss, and detached scalars by their names in `metrics.jsonl`: the same names for
            every batch, and none that the loop writes itself.
        """
        ...

    def next_state(self, state: State, scalars: Mapping[str, float]) -> State:
        """The state after a step, from what is the same in every process.

        Args:
            state: Before the step.
            scalars: The logged scalars of the whole step, of all processes.
        """
        return state


class LossOf(nn.Module):
    """A model as a function from a micro-batch to its loss; what data parallelism wraps.

    The loss is tied, with weight 0, to one trainable parameter: a batch of text in a stage where
    only visual parameters are trainable has a backward pass too, in which every process takes part.

    Args:
        model: Trained; its rules are applied.
        objective: What is minimised.
        reference: For objectives that need one.
    """

    def __init__(self, model: nn.Module, objective: Objective, reference: nn.Module | None):
        super().__init__()
        self.model, self.objective = model, objective
        self._reference = (reference,)  # in a tuple: it is no part of this module

    def forward(
        self, batch: Batch, denominator: Tensor, state: State
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective.loss`."""
        arguments: Any = (batch, denominator, state, *self._reference)
        loss, scalars = self.objective.loss(self.model, *arguments)
        for parameter in self.model.parameters():
            # What is sharded and not gathered now is tied where it is, see `FullyShard`.
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                return loss + 0.0 * parameter.flatten()[0], scalars
        return loss, scalars
