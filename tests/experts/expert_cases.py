"""Experts, rows and routings to compare implementations on, with eager as the reference."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mono_internvl.configuration.model import MonoInternVLTextConfig
from mono_internvl.experts import Routing
from mono_internvl.model.layers import FeedForward, route

# Largest difference, relative to the largest entry of the reference, over all cases below.
# Measured on a CPU: 8e-7 in fp32, 8e-3 in bf16 (one rounding, in another place); the planted faults
# of `test_implementations.py` make more than 0.03.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Case:
    """Rows, their kinds, and widths that are multiples of no tile."""

    name: str
    is_visual: Tensor
    width: int = 24
    ffn_width: int = 40


def _runs(*lengths: int) -> Tensor:
    kinds = [torch.full((n,), i % 2 == 1) for i, n in enumerate(lengths)]
    return torch.cat(kinds)


def _one_visual(rows: int, at: int) -> Tensor:
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[at] = True
    return mask


def _alternating(rows: int) -> Tensor:
    return torch.arange(rows) % 2 == 0


SMALL_CASES = (
    Case("one row, text", _runs(1)),
    Case("one row, visual", _runs(0, 1)),
    Case("no visual", _runs(37)),
    Case("all visual", _runs(0, 37)),
    Case("one visual first", _one_visual(33, 0)),
    Case("one visual last", _one_visual(33, 32)),
    Case("one text last", ~_one_visual(33, 32)),
    Case("alternating", _alternating(50)),
    Case("runs", _runs(5, 32, 3, 16, 1)),
    Case("tail of one row", _runs(17, 33), 17, 33),
    Case("odd widths", _runs(7, 20, 9), 19, 45),
)
LARGE_CASES = (
    Case("1,000 rows", _runs(200, 768, 32), 48, 72),
    Case("100,000 rows", _runs(20_000, 60_001, 19_999), 8, 12),
)


def _pair(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.ModuleList:
    generator = torch.Generator().manual_seed(0)
    pair = nn.ModuleList((make(), make()))
    with torch.no_grad():
        for p in pair.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    return pair.to(dtype)


def feed_forwards(case: Case, dtype: torch.dtype = torch.float32) -> nn.ModuleList:
    """A text expert and an unrelated visual one."""
    config = MonoInternVLTextConfig(
        hidden_size=case.width, intermediate_size=case.ffn_width, head_dim=2
    )
    return _pair(lambda: FeedForward(config), dtype)


def projections(case: Case, bias: bool, dtype: torch.dtype = torch.float32) -> nn.ModuleList:
    """Two projections of attention."""
    return _pair(lambda: nn.Linear(case.width, case.ffn_width, bias=bias), dtype)


def run(
    name: str, case: Case, experts: nn.ModuleList, device: str = "cpu"
) -> dict[str, Tensor | None]:
    """Output and every gradient of one pass: rows in, a fixed gradient back.

    Args:
        name: Of the implementation.
        case: Rows and kinds.
        experts: Text and visual expert; frozen parameters stay without gradient.
        device: Where.
    """
    experts = experts.to(device)
    experts.zero_grad(set_to_none=True)
    dtype = next(experts.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.is_visual.numel(), case.width, generator=generator)
    x = x.to(device, dtype).requires_grad_()
    routing = Routing.from_mask(case.is_visual).to(torch.device(device)).by(name)
    y = route_all(x, routing, *experts)
    dy = torch.randn(y.shape, generator=generator).to(device, dtype)
    y.backward(dy)
    gradients = {name: p.grad for name, p in experts.named_parameters()}
    return {"output": y.detach(), "rows": x.grad, **gradients}


def route_all(x: Tensor, routing: Routing, text: nn.Module, visual: nn.Module) -> Tensor:
    """`route`, but an implementation gets the rows also where all are of one kind."""
    from mono_internvl.experts import run_implementation

    y = run_implementation(x, routing, text, visual)
    return route(x, routing, text, visual) if y is None else y


def difference(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> float:
    """Largest difference of any tensor, relative to the largest entry of the reference.

    An expert without rows has no gradient by eager and zeros or none by others.
    """
    worst = 0.0
    for name, reference in expected.items():
        ours = found[name]
        if reference is None or reference.numel() == 0:
            worst = max(worst, 0.0 if ours is None else float(ours.abs().sum()))
            continue
        assert ours is not None, f"{name}: no gradient"
        assert ours.shape == reference.shape and ours.dtype == reference.dtype, name
        scale = max(float(reference.abs().max()), 1e-12)
        gap = float((ours.float() - reference.float()).abs().max()) / scale
        worst = max(worst, gap if gap == gap else float("inf"))
    return worst
