"""Mixed preference optimisation: which answer of two is better, how good each is, how it reads.

Legend: P pairs, B = 2 P rows, T tokens, R labelled rows.

Source: MPO, arXiv 2411.10442, as InternVL3 (arXiv 2504.10479) trains with it.
Differs: the reward shift of a step is the mean over the steps before it, where TRL, which the
    released code builds on, takes the micro-batch itself in; so accumulation and the number of
    processes change nothing. The reference answers in the loop: nothing about it is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from mono_internvl.data.batches import Batch
from mono_internvl.training.objectives.objective import Objective, State


@dataclass(frozen=True)
class MPO(Objective):
    """Preference (DPO), quality (BCO with a running reward shift) and generation (next token).

    A reward is beta times the logarithm of how much likelier an answer became since the stage
    began. Preference is that the chosen one's is higher; quality that the chosen one's is above,
    and the rejected one's below, a shift: the mean of all rewards so far.

    Attributes:
        beta: Of the rewards.
        preference_weight: Of -log sigmoid(chosen reward - rejected reward).
        quality_weight: Of -log sigmoid(chosen reward - shift) - log sigmoid(shift - rejected
            reward).
        generation_weight: Of the mean cross-entropy of the chosen answer's tokens.
        name: "mpo".
    """

    beta: float = 0.1
    preference_weight: float = 0.8
    quality_weight: float = 0.2
    generation_weight: float = 1.0
    name: str = field(default="mpo", init=False)

    @property
    def needs_reference(self) -> bool:
        """Rewards are against the model that the stage starts from."""
        return True

    @property
    def reads_pairs(self) -> bool:
        """A chosen and a rejected answer to each question."""
        return True

    def initial_state(self) -> State:
        """The reward shift and how many steps it is the mean of."""
        return {"shift": torch.zeros(()), "steps": torch.zeros((), dtype=torch.int64)}

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        denominator: Tensor,
        state: State,
        reference: nn.Module | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over pairs; `denominator` is their number, as every chosen answer weighs 1."""
        assert reference is not None, "the loop keeps one: needs_reference"
        inputs = _inputs(batch)
        out = model(**inputs, loss_weight=batch.loss_weight, num_items_in_batch=denominator)
        with torch.no_grad():
            before = _answer_logprobs(reference(**inputs).label_losses, batch)  # (B,)
        rewards = self.beta * (_answer_logprobs(out.label_losses, batch) - before)
        chosen, rejected = rewards.chunk(2)  # (P,) each
        shift = state["shift"].to(rewards.device, non_blocking=True)
        preference = -logsigmoid(chosen - rejected)
        quality = -logsigmoid(chosen - shift) - logsigmoid(shift - rejected)
        pairs = {
            "preference": preference,
            "quality": quality,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "ranked": (chosen > rejected).float(),
            "shift": shift.expand_as(chosen),
        }
        means = {name: values.sum() / denominator for name, values in pairs.items()}
        loss = (
            self.preference_weight * means["preference"]
            + self.quality_weight * means["quality"]
            + self.generation_weight * out.loss
        )
        logged = {**means, "generation": out.loss}
        return loss, {name: value.detach() for name, value in logged.items()}

    def next_state(self, state: State, scalars: Mapping[str, float]) -> State:
        """The shift with the mean reward of the step, each step weighing the same."""
        steps = state["steps"] + 1
        reward = (scalars["reward_chosen"] + scalars["reward_rejected"]) / 2
        return {"shift": state["shift"] + (reward - state["shift"]) / steps, "steps": steps}


def _inputs(batch: Batch) -> dict[str, Any]:
    """What policy and reference are both given; no logits but those of labels."""
    return {
        "input_ids": batch.input_ids,
        "pixel_values": batch.pixel_values,
        "feature_order": batch.feature_order,
        "routing": batch.routing,
        "labelled": batch.labelled,
        "labels": batch.labels,
        "logits_to_keep": None,
        "output_label_losses": True,
    }


def _answer_logprobs(label_losses: Tensor, batch: Batch) -> Tensor:
    """(B,) logarithms of the answers' probabilities, of (R,) cross-entropies."""
    rows = batch.labelled.rows // batch.input_ids.shape[1]
    return -label_losses.new_zeros(len(batch.input_ids)).index_add(0, rows, label_losses)
