"""The weights of a text expert and of its visual copy, as implementations read them.

Legend: D width, I feed-forward width, out and in: sides of a projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mono_internvl.errors import ExpertsUnavailable


@dataclass(frozen=True)
class LinearPair:
    """One projection, twice: (out, in) weights and (out,) biases, text first, visual second."""

    text: Tensor
    visual: Tensor
    text_bias: Tensor | None = None
    visual_bias: Tensor | None = None

    def under_autocast(self, x: Tensor) -> tuple[Tensor, LinearPair]:
        """Rows and weights as `F.linear` would see them: cast where autocast is on.

        Implementations call products that autocast does not know.
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
    def projections(self) -> tuple[LinearPair, LinearPair, LinearPair]:
        """Gate, up, down."""
        return self.gate, self.up, self.down

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gate, up, down of the text expert, then of the visual one."""
        gate, up, down = self.gate, self.up, self.down
        return gate.text, up.text, down.text, gate.visual, up.visual, down.visual


def expert_pair(text: nn.Module, visual: nn.Module) -> LinearPair | SwiGLUPair:
    """The weights of two experts, so that their rows may be computed without calling the modules.

    Args:
        text: The text expert: a feed-forward network or a projection.
        visual: Its copy.

    Raises:
        ExpertsUnavailable: A module does more than its weight says: an adapter (LoRA), a quantised
            layer, a sharded parameter, a hook, another activation than SiLU.
    """
    names = ("gate_proj", "up_proj", "down_proj")
    if not all(hasattr(module, name) for module in (text, visual) for name in names):
        return _linear_pair(text, visual)
    for act_fn in (text.act_fn, visual.act_fn):
        if not (isinstance(act_fn, nn.SiLU) or type(act_fn).__name__ == "SiLUActivation"):
            raise ExpertsUnavailable(f"the activation is {type(act_fn).__name__}, not SiLU")
    _check_hooks(text, visual, text.act_fn, visual.act_fn)
    pair = SwiGLUPair(*(_linear_pair(getattr(text, n), getattr(visual, n)) for n in names))
    if any(p.text_bias is not None or p.visual_bias is not None for p in pair.projections):
        raise ExpertsUnavailable("the feed-forward projections have biases")
    return pair


def _linear_pair(text: nn.Module, visual: nn.Module) -> LinearPair:
    for linear in (text, visual):
        if type(linear) is not nn.Linear:
            raise ExpertsUnavailable(
                f"an expert holds a {type(linear).__name__} instead of a plain nn.Linear"
            )
        if type(linear.weight) is not nn.Parameter:
            raise ExpertsUnavailable(
                f"an expert's weight is a {type(linear.weight).__name__}, not a plain parameter"
            )
    _check_hooks(text, visual)
    assert isinstance(text, nn.Linear) and isinstance(visual, nn.Linear)
    return LinearPair(text.weight, visual.weight, text.bias, visual.bias)


def _check_hooks(*modules: object) -> None:
    for module in modules:
        if isinstance(module, nn.Module) and (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        ):
            raise ExpertsUnavailable("an expert has hooks")
