"""The weights of a text expert and of its visual copy, as the paths read them.

Legend: D width, I feed-forward width, out and in: sides of a projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LinearPair:
    """One projection, twice: (out, in) weights and (out,) biases, text first, visual second."""

    text: Tensor
    visual: Tensor
    text_bias: Tensor | None = None
    visual_bias: Tensor | None = None

    def under_autocast(self, x: Tensor) -> tuple[Tensor, LinearPair]:
        """Rows and weights as `F.linear` would see them: cast where autocast is on.

        The paths call products that autocast does not know.
        """
        if not torch.is_autocast_enabled(x.device.type):
            return x, self
        dtype = torch.get_autocast_dtype(x.device.type)
        return x.to(dtype), LinearPair(
            self.text.to(dtype),
            self.visual.to(dtype),
            None if self.text_bias is None else self.text_bias.to(dtype),
            None if self.visual_bias is None else self.visual_bias.to(dtype),
        )


@dataclass(frozen=True)
class SwiGLUPair:
    """A SwiGLU network, twice: gate and up (I, D), down (D, I), no biases."""

    gate: LinearPair
    up: LinearPair
    down: LinearPair

    def under_autocast(self, x: Tensor) -> tuple[Tensor, SwiGLUPair]:
        """See `LinearPair.under_autocast`."""
        y, gate = self.gate.under_autocast(x)
        return y, SwiGLUPair(gate, self.up.under_autocast(x)[1], self.down.under_autocast(x)[1])

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gate, up, down of the text expert, then of the visual one."""
        gate, up, down = self.gate, self.up, self.down
        return gate.text, up.text, down.text, gate.visual, up.visual, down.visual


def _is_silu(act_fn: object) -> bool:
    return isinstance(act_fn, nn.SiLU) or type(act_fn).__name__ == "SiLUActivation"


def _objection(linear: nn.Module) -> str | None:
    """Why the weight of a module does not say all that the module does, or None."""
    if type(linear) is not nn.Linear:
        return f"an expert holds a {type(linear).__name__} instead of a plain nn.Linear"
    if type(linear.weight) is not nn.Parameter:
        return f"an expert's weight is a {type(linear.weight).__name__}, not a plain parameter"
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks:
        return "a projection of an expert has hooks"
    return None


def _linear_pair(text: nn.Module, visual: nn.Module) -> LinearPair | str:
    if reason := _objection(text) or _objection(visual):
        return reason
    assert isinstance(text, nn.Linear) and isinstance(visual, nn.Linear)
    return LinearPair(text.weight, visual.weight, text.bias, visual.bias)


def expert_pair(text: nn.Module, visual: nn.Module) -> LinearPair | SwiGLUPair | str | None:
    """The weights of two experts, so that a path may compute with them instead of calling modules.

    Adapters (LoRA), quantised layers, sharded parameters and hooks make a module do more than its
    weight says; then the answer is why not, in words.

    Args:
        text: The text expert.
        visual: Its copy.

    Returns:
        The weights; a string why they may not be read; None for modules that no path speeds up.
    """
    names = ("gate_proj", "up_proj", "down_proj")
    if not all(hasattr(text, name) and hasattr(visual, name) for name in names):
        return None if hasattr(text, "eps") else _linear_pair(text, visual)
    if not (_is_silu(text.act_fn) and _is_silu(visual.act_fn)):
        return f"the activation is {type(text.act_fn).__name__}, not SiLU"
    watched = (m for m in (text, visual, text.act_fn, visual.act_fn) if isinstance(m, nn.Module))
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in watched):
        return "an expert has hooks"
    pairs = [_linear_pair(getattr(text, name), getattr(visual, name)) for name in names]
    found = [pair for pair in pairs if isinstance(pair, LinearPair)]
    if len(found) < len(pairs):
        return next(pair for pair in pairs if isinstance(pair, str))
    if any(pair.text_bias is not None or pair.visual_bias is not None for pair in found):
        return "the feed-forward projections have biases"
    return SwiGLUPair(*found)
