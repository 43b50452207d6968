"""The next token of every labelled position: what all published stages minimise."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from mono_internvl.data.batches import Batch
from mono_internvl.training.objectives.objective import Objective, State


@dataclass(frozen=True)
class NextToken(Objective):
    """Cross-entropy of the labels, weighted as the stage weighs its samples.

    Attributes:
        name: "next_token".
    """

    name: str = field(default="next_token", init=False)

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        denominator: Tensor,
        state: State,
        reference: nn.Module | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """sum(weight * cross-entropy) / denominator; logits only where there is a label."""
        loss: Tensor = model(
            input_ids=batch.input_ids,
            pixel_values=batch.pixel_values,
            feature_order=batch.feature_order,
            position_ids=batch.position_ids,
            routing=batch.routing,
            labelled=batch.labelled,
            labels=batch.labels,
            loss_weight=batch.loss_weight,
            num_items_in_batch=denominator,
            logits_to_keep=None,
        ).loss
        return loss, {}
