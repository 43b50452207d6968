"""Less memory in training: recompute in the backward pass what is cheap, keep what is not."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from mono_internvl.errors import RecipeError
from mono_internvl.model.layers import DecoderLayer

Recompute = Literal["none", "selective", "full"]

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Results that are kept: products of weights, and what attention gives; not the scores."""


def enable_recompute(model: PreTrainedModel, recompute: Recompute) -> None:
    """Let a model compute activations again in the backward pass.

    Newer transformers call this activation checkpointing and warn at the old name, the oldest that
    is supported knows only that one.

    Args:
        model: Changed in place.
        recompute: "selective" or "full"; see `checkpointing_options`.

    Raises:
        RecipeError: Another way.
    """
    options = checkpointing_options(recompute)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


def checkpointing_options(recompute: Recompute) -> dict[str, Any]:
    """What transformers takes for a way to recompute.

    Args:
        recompute: "full" keeps the input of a decoder layer and computes the layer again;
            "selective" keeps the products of matrices too and computes norms, rotations, SwiGLU and
            softmax again.

    Raises:
        RecipeError: No such way, or "none", which enables nothing.
    """
    if recompute == "full":
        return {"use_reentrant": False}
    if recompute == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
        return {"use_reentrant": False, "context_fn": contexts}
    raise RecipeError(f"recompute={recompute!r}; expected selective or full")


def compile_layers(model: nn.Module) -> None:
    """Compile every decoder layer by itself, for any number of tokens.

    Args:
        model: Changed in place; compiled when it first runs.
    """
    for layer in model.modules():
        if isinstance(layer, DecoderLayer):
            layer.compile(dynamic=True)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
