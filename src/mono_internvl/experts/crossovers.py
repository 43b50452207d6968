"""Where one path overtakes another, as measured; what `auto` goes by.

Legend: N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mono_internvl.experts.routing import Routing


@dataclass(frozen=True)
class Crossover:
    """From here on `path` is at least as fast as eager.

    Attributes:
        device: Type of the device.
        training: Whether gradients are enabled, so that a backward pass may follow.
        min_rows: Fewest rows.
        min_rows_each: Fewest rows of the rarer kind.
        path: The name.
        measured: What was found, with the command behind it.
    """

    device: str
    training: bool
    min_rows: int
    min_rows_each: int
    path: str
    measured: str


# Empty by measurement on a CPU (the rows of `bench experts` in results/bench.jsonl, a table in
# docs/experts.md: 256 and 1,024 rows, a quarter and three quarters visual, two widths): grouped
# takes 0.95 to 1.07 of eager's time forward; with the backward pass 0.97 to 1.03 for projections
# and 0.99 to 1.18 for feed-forward experts, one scattering cell aside. An in-place SwiGLU without
# a backward pass gained nothing either: 0.99 to 1.03 of eager's time.
# Empty on CUDA because nothing has been measured there.
CROSSOVERS: tuple[Crossover, ...] = ()


def fastest_path(x: Tensor, routing: Routing) -> str:
    """The path that was measured fastest for such rows; eager where nothing was measured.

    Feed-forward experts and projections go by the same table. Reads host integers only: no answer
    depends on the contents of a tensor on a device.

    Args:
        x: (N, D) rows.
        routing: How many of them are visual.
    """
    training = torch.is_grad_enabled()
    rarer = min(routing.num_text, routing.num_visual)
    for row in CROSSOVERS:
        if (
            row.device == x.device.type
            and row.training == training
            and x.shape[0] >= row.min_rows
            and rarer >= row.min_rows_each
        ):
            return row.path
    return "eager"
