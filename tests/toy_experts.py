"""A second implementation of the experts, in plain PyTorch: it plugs in by name and nothing else.

Rows are sorted by expert once, then every product runs over two slices.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mono_internvl.experts import Routing
from mono_internvl.experts.pairs import LinearPair, SwiGLUPair
from mono_internvl.experts.registry import Entry, register_implementation

NAME = "sorted"
ENTRY = Entry("toy_experts", devices=("cpu", "cuda"))


def register() -> str:
    """Make it known; its name."""
    register_implementation(NAME, ENTRY)
    return NAME


def check(x: Tensor) -> None:
    """Takes all rows."""


def gather(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def products(x: Tensor, num_text: int, pair: LinearPair) -> Tensor:
    return torch.cat(
        (
            F.linear(x[:num_text], pair.text, pair.text_bias),
            F.linear(x[num_text:], pair.visual, pair.visual_bias),
        )
    )


def swiglu(x: Tensor, routing: Routing, pair: SwiGLUPair) -> Tensor:
    rows, n = gather(x, routing.sorted_rows), routing.num_text
    hidden = F.silu(products(rows, n, pair.gate)) * products(rows, n, pair.up)
    return gather(products(hidden, n, pair.down), routing.row_order)


def linear(x: Tensor, routing: Routing, pair: LinearPair) -> Tensor:
    y = products(gather(x, routing.sorted_rows), routing.num_text, pair)
    return gather(y, routing.row_order)
