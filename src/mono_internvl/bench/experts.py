"""`bench experts`: one expert layer by every implementation, against the price of a single expert.

Legend: N rows, D width, I feed-forward width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mono_internvl.bench.dense import DENSE, register_dense
from mono_internvl.bench.models import Setting, Size
from mono_internvl.bench.rows import BenchRow, Claim
from mono_internvl.bench.timing import Subject, measure
from mono_internvl.configuration.model import MonoInternVLTextConfig
from mono_internvl.errors import ExpertsUnavailable
from mono_internvl.experts import Routing
from mono_internvl.experts.pairs import SwiGLUPair, expert_pair
from mono_internvl.experts.registry import EAGER, implementation_for
from mono_internvl.model.layers import FeedForward, route

ONE, ONE_PROJECTION = "one FFN, all rows", "one projection, all rows"
TWO, TWO_PROJECTIONS = "two FFNs, rows split before", "two projections, rows split before"
FFN, PROJECTION = "experts", "experts: projection"
"""Names of the comparisons."""
LIMIT = "one matrix product of as many FLOPs"
IMPLEMENTATIONS = (EAGER, "triton", DENSE)
KEPT_SORTED = {"triton": "triton, rows kept sorted"}
"""Implementation -> the subject that finds its rows sorted already and leaves them so."""
FORWARD, BOTH = "forward", "forward and backward"
# Rows and visual shares of the grid, by device type.
TOKENS = {"cpu": (256, 1024), "cuda": (256, 1024, 8192, 32768)}
SHARES = (0.25, 0.75)
# Relative to the largest entry of eager's tensor; swapped experts or a lost tile make over 0.3.
GAPS = {torch.float32: 1e-3, torch.bfloat16: 3e-2}

Outputs = Tensor | tuple[Tensor, ...]
"""(N, D), or parts of it in order."""


@dataclass(frozen=True)
class Cell:
    """One place of the grid.

    Attributes:
        tokens: Rows.
        visual_tokens: How many of them are visual: one run after a quarter of the text.
        width: D.
        ffn_width: I; None for a projection from D to D, as 1.5 has experts of.
    """

    tokens: int
    visual_tokens: int
    width: int
    ffn_width: int | None = None

    @property
    def shapes(self) -> dict[str, int]:
        """The sizes that a row shows."""
        shown = {"tokens": self.tokens, "visual_tokens": self.visual_tokens, "width": self.width}
        return shown if self.ffn_width is None else {**shown, "ffn_width": self.ffn_width}

    @property
    def products_width(self) -> int:
        """Width of one product from D with as many FLOPs as an expert owes."""
        return self.width if self.ffn_width is None else 3 * self.ffn_width

    def expert(self) -> nn.Module:
        """One expert with random weights."""
        if self.ffn_width is None:
            return nn.Linear(self.width, self.width, bias=False)
        config = MonoInternVLTextConfig(
            hidden_size=self.width, intermediate_size=self.ffn_width, head_dim=2
        )
        return FeedForward(config)

    def routing(self, device: torch.device) -> Routing:
        """Which rows are visual."""
        first = (self.tokens - self.visual_tokens) // 4
        place = torch.arange(self.tokens)
        return Routing.from_mask((place >= first) & (place < first + self.visual_tokens)).to(device)


@dataclass(frozen=True)
class Experts:
    """A text and a visual expert with random weights, rows, and a gradient of the output.

    Attributes:
        text: Expert.
        visual: Expert.
        x: (N, D) rows.
        parts: As many rows again, split: (num_text, D) and (num_visual, D).
        dy: (N, D).
        routing: Which rows are visual.
        passes: `FORWARD` or `BOTH`.
    """

    text: nn.Module
    visual: nn.Module
    x: Tensor
    parts: tuple[Tensor, Tensor]
    dy: Tensor
    routing: Routing
    passes: str

    @classmethod
    def random(cls, cell: Cell, passes: str, dtype: torch.dtype, device: torch.device) -> Experts:
        """Of a cell's sizes."""
        torch.manual_seed(0)
        n = cell.visual_tokens
        text, visual = (cell.expert().to(device, dtype) for _ in range(2))
        x = torch.randn(cell.tokens, cell.width, device=device, dtype=dtype)
        first, second = (part.clone() for part in x.split([cell.tokens - n, n]))
        for rows in (x, first, second):
            rows.requires_grad_(passes == BOTH)
        dy, routing = torch.randn_like(x), cell.routing(device)
        return cls(text, visual, x, (first, second), dy, routing, passes)

    def by(self, name: str) -> Tensor:
        """(N, D) by the implementation of this name."""
        return route(self.x, self.routing.by(name), self.text, self.visual)

    def by_sorted(self, name: str) -> Tensor:
        """(N, D) by one of `KEPT_SORTED`, the rows taken as sorted: nothing is put in order."""
        implementation = implementation_for(name, self.x)
        pair = expert_pair(self.text, self.visual)
        routing = Routing(self.routing.num_text, self.routing.num_visual)
        if isinstance(pair, SwiGLUPair):
            return implementation.swiglu(self.x, routing, pair)
        return implementation.linear(self.x, routing, pair)

    def of_one(self) -> Tensor:
        """(N, D), every row through the text expert."""
        return self.text(self.x)

    def of_two(self) -> tuple[Tensor, Tensor]:
        """(num_text, D) and (num_visual, D): each part of the split rows through its expert."""
        return self.text(self.parts[0]), self.visual(self.parts[1])

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gets a gradient: rows and all weights."""
        return (self.x, *self.parts, *self.text.parameters(), *self.visual.parameters())

    def run(self, forward: Callable[[], Outputs]) -> tuple[Tensor | None, ...]:
        """The output, whole or in parts, alone or with all gradients."""
        if self.passes == FORWARD:
            with torch.no_grad():
                return _parts_of(forward())
        for leaf in self.leaves:
            leaf.grad = None
        parts = _parts_of(forward())
        torch.autograd.backward(parts, self.dy.split([len(part) for part in parts]))
        return (*(part.detach() for part in parts), *(leaf.grad for leaf in self.leaves))


def _parts_of(y: Outputs) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


def runnable(x: Tensor) -> list[str]:
    """The implementations that can take such rows here, eager first."""
    register_dense()
    found = [EAGER]
    for name in IMPLEMENTATIONS[1:]:
        try:
            implementation_for(name, x)
        except ExpertsUnavailable:
            continue
        found.append(name)
    return found


def grid(size: Size, device: torch.device) -> list[Cell]:
    """Kind of expert x rows x visual share at a size's widths."""
    return [
        Cell(tokens, int(tokens * share), size.width, ffn_width)
        for ffn_width in (size.ffn_width, None)
        for tokens in TOKENS[device.type]
        for share in SHARES
    ]


def bench_cell(cell: Cell, passes: str, setting: Setting) -> list[BenchRow]:
    """Every implementation that runs, two experts on split rows, one alone (baseline), the limit.

    The limit is a single product of as many FLOPs as one expert owes: what the machine reaches with
    such sizes in the same run. With the backward pass it runs three times, as the FLOPs do; every
    weight of both experts gets a gradient there. On an accelerator `triton` also runs as it
    would if the stream were kept sorted from layer to layer, and forward passes are replayed as
    graphs, so that the device's time is compared and not the host's.

    Args:
        cell: Rows and widths.
        passes: `FORWARD` or `BOTH`.
        setting: What to run with; its size is not read.
    """
    dtype, device = setting.dtype, setting.device
    experts = Experts.random(cell, passes, dtype, device)
    what, one, two = (
        (FFN, ONE, TWO) if cell.ffn_width else (PROJECTION, ONE_PROJECTION, TWO_PROJECTIONS)
    )
    weight = torch.randn(cell.width, cell.products_width, device=device, dtype=dtype)
    rows = experts.x.detach()

    def limit() -> None:
        for _ in range(1 if passes == FORWARD else 3):
            rows @ weight

    names = runnable(rows)
    ways: dict[str, Callable[[], Outputs]] = {one: experts.of_one, two: experts.of_two}
    for name in names:  # as in a model, where the routing is made once for all layers
        routing = experts.routing.by(name)
        ways[name] = functools.partial(route, experts.x, routing, experts.text, experts.visual)
    if device.type != "cpu":
        ways |= {
            subject: functools.partial(experts.by_sorted, name)
            for name, subject in KEPT_SORTED.items()
            if name in names
        }
    notes = {"pass": passes}
    is_captured = passes == FORWARD
    subjects = [Subject(LIMIT, limit, notes, is_captured=is_captured)]
    for name, forward in ways.items():
        run = functools.partial(experts.run, forward)
        subjects.append(Subject(name, run, notes, is_captured=is_captured))
    return measure(what, subjects, setting, baseline=one, shapes=cell.shapes, layers=1)


def bench_experts(setting: Setting) -> Iterator[BenchRow]:
    """The whole grid at the size's widths, forward alone and with the backward pass."""
    for cell in grid(setting.size, setting.device):
        for passes in (FORWARD, BOTH):
            yield from bench_cell(cell, passes, setting)


def largest_gap(name: str, cell: Cell, dtype: torch.dtype, device: torch.device) -> float:
    """Of output and gradients to eager's, each relative to the largest entry there.

    Args:
        name: Of the implementation.
        cell: Rows and widths.
        dtype: Of weights and rows.
        device: Where.
    """
    experts = Experts.random(cell, BOTH, dtype, device)
    found = experts.run(functools.partial(experts.by, name))
    expected = experts.run(functools.partial(experts.by, EAGER))
    gaps = []
    for ours, reference in zip(found, expected, strict=True):
        if ours is None or reference is None:
            gaps.append(0.0 if ours is reference else math.inf)
            continue
        gap = float((ours - reference).abs().max() / reference.abs().max())
        gaps.append(math.inf if math.isnan(gap) else gap)
    return max(gaps)


def check_implementations(dtype: torch.dtype, device: torch.device) -> list[Claim]:
    """Whether every runnable implementation gives eager's values and gradients on ragged cells."""
    widths = ((513, 1, 136, 200), (513, 512, 136, 200), (1025, 768, 256, 520))
    cells = [Cell(*sizes) for sizes in widths] + [Cell(*sizes[:3]) for sizes in widths]
    probe = torch.empty(1, 1, dtype=dtype, device=device)
    precision = str(dtype).removeprefix("torch.")
    where = "" if device.type == "cpu" else "GPU: "
    return [
        Claim.judge(
            f"{where}{name} equals eager, values and gradients, {precision}",
            "<=",
            GAPS[dtype],
            max(largest_gap(name, cell, dtype, device) for cell in cells),
            "largest difference / largest entry",
        )
        for name in runnable(probe)
        if name != EAGER
    ]
