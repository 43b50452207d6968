"""The optimizer of a stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mono_internvl.training.recipe import Stage
from mono_internvl.training.rules import TrainableGroup


def optimizer_of(
    model: nn.Module, groups: Sequence[TrainableGroup], stage: Stage
) -> torch.optim.Optimizer:
    """AdamW over the trainable groups, at their peak rates.

    Args:
        model: Its parameters are looked up by name.
        groups: What `apply_rules` gives.
        stage: Its moments are taken.
    """
    parameters = dict(model.named_parameters())
    return torch.optim.AdamW(
        [
            {
                "params": [parameters[name] for name in group.names],
                "lr": group.learning_rate,
                "peak_rate": group.learning_rate,
                "weight_decay": group.weight_decay,
            }
            for group in groups
        ],
        betas=stage.betas,
        eps=stage.eps,
        fused=True,
    )
