"""`bench experts` and `bench gpu`: one expert layer by every path, against the price of one FFN.

Legend: N rows, D width, I feed-forward width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mono_internvl.bench.models import Size
from mono_internvl.bench.rows import BenchRow, Target
from mono_internvl.bench.timing import Subject, measure
from mono_internvl.errors import ExpertPathUnavailable
from mono_internvl.experts import Routing
from mono_internvl.experts.registry import expert_path
from mono_internvl.model.configuration import MonoInternVLTextConfig
from mono_internvl.model.layers import FeedForward, route

ONE = "one FFN, all rows"
TWO = "two FFNs, rows split before"
LIMIT = "one matrix product of as many FLOPs"
PATHS = ("eager", "grouped", "triton", "dense")
FORWARD, BOTH = "forward", "forward and backward"
# Rows and visual shares of the grid, by device type.
TOKENS = {"cpu": (256, 1024), "cuda": (256, 1024, 8192, 32768)}
SHARES = (0.25, 0.75)
# Relative to the largest entry of eager's tensor; swapped experts or a lost tile make over 0.3.
GAPS = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Cell:
    """One place of the grid.

    Attributes:
        tokens: Rows.
        visual_tokens: How many of them are visual: one run after a quarter of the text.
        width: D.
        ffn_width: I.
    """

    tokens: int
    visual_tokens: int
    width: int
    ffn_width: int

    @property
    def shapes(self) -> dict[str, int]:
        """The sizes that a row shows."""
        return {
            "tokens": self.tokens,
            "visual_tokens": self.visual_tokens,
            "width": self.width,
            "ffn_width": self.ffn_width,
        }

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
        config = MonoInternVLTextConfig(
            hidden_size=cell.width, intermediate_size=cell.ffn_width, head_dim=2
        )
        torch.manual_seed(0)
        n = cell.visual_tokens
        text, visual = (FeedForward(config).to(device, dtype) for _ in range(2))
        x = torch.randn(cell.tokens, cell.width, device=device, dtype=dtype)
        first, second = (part.clone() for part in x.split([cell.tokens - n, n]))
        for rows in (x, first, second):
            rows.requires_grad_(passes == BOTH)
        dy, routing = torch.randn_like(x), cell.routing(device)
        return cls(text, visual, x, (first, second), dy, routing, passes)

    def by(self, path: str) -> Tensor:
        """(N, D) by the path of this name."""
        return route(self.x, self.routing.by(path), self.text, self.visual)

    def of_one(self) -> Tensor:
        """(N, D), every row through the text expert."""
        return self.text(self.x)

    def of_two(self) -> Tensor:
        """(N, D), each part of the split rows through its expert."""
        return torch.cat((self.text(self.parts[0]), self.visual(self.parts[1])))

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gets a gradient: rows and all weights."""
        return (self.x, *self.parts, *self.text.parameters(), *self.visual.parameters())

    def run(self, forward: Callable[[], Tensor]) -> tuple[Tensor | None, ...]:
        """The output alone, or the output and all gradients."""
        if self.passes == FORWARD:
            with torch.no_grad():
                return (forward(),)
        for leaf in self.leaves:
            leaf.grad = None
        y = forward()
        y.backward(self.dy)
        return (y.detach(), *(leaf.grad for leaf in self.leaves))


def runnable_paths(x: Tensor) -> list[str]:
    """The paths that can take such rows here, eager first."""
    found = ["eager"]
    for name in PATHS[1:]:
        try:
            reason = expert_path(name).unavailable(x)
        except ExpertPathUnavailable:
            continue
        if reason is None:
            found.append(name)
    return found


def grid(size: Size, device: torch.device) -> list[Cell]:
    """Rows x visual share at a size's widths."""
    return [
        Cell(tokens, int(tokens * share), size.width, size.ffn_width)
        for tokens in TOKENS[device.type]
        for share in SHARES
    ]


def bench_cell(
    cell: Cell,
    passes: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    command: str,
) -> list[BenchRow]:
    """Every runnable path, two FFNs on split rows, one FFN (the baseline) and the limit.

    The limit is a single product of as many FLOPs as one FFN owes: what the machine reaches with
    such sizes in the same run. With the backward pass it runs three times, as the FLOPs do; every
    weight of both experts gets a gradient there.

    Args:
        cell: Rows and widths.
        passes: `FORWARD` or `BOTH`.
        dtype: Of weights and rows.
        device: Where.
        rounds: Interleaved runs of each subject.
        command: For the rows.
    """
    experts = Experts.random(cell, passes, dtype, device)
    weight = torch.randn(cell.width, 3 * cell.ffn_width, device=device, dtype=dtype)
    rows = experts.x.detach()

    def limit() -> None:
        for _ in range(1 if passes == FORWARD else 3):
            rows @ weight

    ways: dict[str, Callable[[], Tensor]] = {ONE: experts.of_one, TWO: experts.of_two}
    ways |= {path: functools.partial(experts.by, path) for path in runnable_paths(rows)}
    notes = {"pass": passes}
    subjects = [Subject(LIMIT, limit, notes)]
    for name, forward in ways.items():
        subjects.append(Subject(name, functools.partial(experts.run, forward), notes))
    return measure(
        "experts",
        subjects,
        baseline=ONE,
        rounds=rounds,
        device=device,
        command=command,
        shapes=cell.shapes,
        layers=1,
        dtype=dtype,
    )


def bench_experts(
    size: Size, *, dtype: torch.dtype, device: torch.device, rounds: int, command: str
) -> list[BenchRow]:
    """The whole grid, forward alone and with the backward pass.

    Args:
        size: Its widths are taken.
        dtype: Of weights and rows.
        device: Where.
        rounds: Interleaved runs of each subject in each cell.
        command: For the rows.
    """
    settings = {"dtype": dtype, "device": device, "rounds": rounds, "command": command}
    return [
        row
        for cell in grid(size, device)
        for passes in (FORWARD, BOTH)
        for row in bench_cell(cell, passes, **settings)  # type: ignore[arg-type]
    ]


def largest_gap(path: str, cell: Cell, dtype: torch.dtype, device: torch.device) -> float:
    """Of output and gradients to eager's, each relative to the largest entry there.

    Args:
        path: Name.
        cell: Rows and widths.
        dtype: Of weights and rows.
        device: Where.
    """
    experts = Experts.random(cell, BOTH, dtype, device)
    found = experts.run(functools.partial(experts.by, path))
    expected = experts.run(functools.partial(experts.by, "eager"))
    gaps = []
    for ours, reference in zip(found, expected, strict=True):
        if ours is None or reference is None:
            gaps.append(0.0 if ours is reference else math.inf)
            continue
        gap = float((ours - reference).abs().max() / reference.abs().max())
        gaps.append(math.inf if math.isnan(gap) else gap)
    return max(gaps)


def check_paths(dtype: torch.dtype, device: torch.device) -> list[Target]:
    """Whether every runnable path gives eager's values and gradients on ragged cells."""
    cells = [Cell(513, 1, 136, 200), Cell(513, 512, 136, 200), Cell(1025, 768, 256, 520)]
    probe = torch.empty(1, 1, dtype=dtype, device=device)
    name = str(dtype).removeprefix("torch.")
    return [
        Target.judge(
            f"{path} equals eager, values and gradients, {name}",
            "<=",
            GAPS[dtype],
            max(largest_gap(path, cell, dtype, device) for cell in cells),
            "largest difference / largest entry",
        )
        for path in runnable_paths(probe)
        if path != "eager"
    ]


def gpu_targets(rows: Sequence[BenchRow]) -> list[Target]:
    """What one expert layer is held to on a GPU, from the rows of `bench_experts` in bf16.

    Args:
        rows: Of a CUDA device; without any, every target is left without a value.
    """
    dense, split, limits = [], [], []
    cells: dict[tuple[object, ...], dict[str, float]] = {}
    for row in rows:
        key = (*row.shapes.values(), row.notes["pass"])
        cells.setdefault(key, {})[row.subject] = row.p50
    for key, times in cells.items():
        best = min(times[path] for path in PATHS if path in times and path != "dense")
        dense.append(times["dense"] / best)
        split.append(times[TWO] / best)
        if key[0] == 8192 and key[-1] == FORWARD:
            limits.append(times[LIMIT] / best)
    note = "" if rows else "not measured: needs a CUDA device"
    mean = math.exp(sum(map(math.log, split)) / len(split)) if split else None
    return [
        Target.judge("GPU: dense / best path", ">=", 1.75, min(dense, default=None), note),
        Target.judge(
            "GPU: two FFNs on split rows / best path", ">=", 0.97, min(split, default=None), note
        ),
        Target.judge("GPU: the same, geometric mean", ">=", 1.0, mean, note),
        Target.judge(
            "GPU: best path's share of one product's rate, 8,192 rows, forward",
            ">=",
            0.75,
            min(limits, default=None),
            note,
        ),
    ]


def bench_gpu(
    size: Size, *, dtype: torch.dtype, device: torch.device, rounds: int, command: str
) -> list[BenchRow | Target]:
    """Build, check and time the expert kernels on a GPU; without one, the targets stay empty.

    Args:
        size: Its widths are taken.
        dtype: Of the timed weights and rows; fp32 is checked, too.
        device: Where; on a CPU nothing is measured.
        rounds: Interleaved runs of each subject in each cell.
        command: For the rows.
    """
    if device.type != "cuda":
        return list(gpu_targets(()))
    checks = [check for kind in (torch.float32, dtype) for check in check_paths(kind, device)]
    rows = bench_experts(size, dtype=dtype, device=device, rounds=rounds, command=command)
    return [*checks, *rows, *gpu_targets(rows)]
