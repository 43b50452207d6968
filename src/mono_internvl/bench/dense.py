"""The masked blend of the released code, both experts on all rows: a subject, nobody's choice.

Source: the released modelling file computes `text(x) * (1 - mask) + visual(x) * mask`; twice the
feed-forward work, and an inf in one expert reaches rows of the other (inf * 0).

Legend: N rows, D width.
"""

import torch.nn.functional as F
from torch import Tensor

from mono_internvl.experts.pairs import LinearPair, SwiGLUPair
from mono_internvl.experts.registry import Entry, register_implementation
from mono_internvl.experts.routing import Routing

DENSE = "dense"
"""Name of the implementation, once it is registered."""


def register_dense() -> None:
    """Make the blend known by its name."""
    devices = ("cpu", "cuda", "mps", "xpu")
    register_implementation(DENSE, Entry("mono_internvl.bench.dense", devices))


def check(x: Tensor) -> None:
    """Takes all rows."""


def _blend(y_text: Tensor, y_visual: Tensor, routing: Routing) -> Tensor:
    mask = routing.is_visual(y_text.device)[:, None].to(y_text.dtype)  # (N, 1)
    return y_text * (1 - mask) + y_visual * mask


def swiglu(x: Tensor, routing: Routing, pair: SwiGLUPair) -> Tensor:
    """(N, D) rows through both feed-forward experts, then blended."""

    def network(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    weights = pair.weights
    return _blend(network(*weights[:3]), network(*weights[3:]), routing)


def linear(x: Tensor, routing: Routing, pair: LinearPair) -> Tensor:
    """(N, in) rows through both projections, then blended."""
    return _blend(
        F.linear(x, pair.text, pair.text_bias), F.linear(x, pair.visual, pair.visual_bias), routing
    )
