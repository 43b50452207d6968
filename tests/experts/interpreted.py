"""Run by `test_triton.py` with TRITON_INTERPRET=1: the kernels on a CPU, gaps to eager as JSON.

What a kernel leaves unwritten is NaN here, so that no leftover of an earlier run can look right.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expert_cases import SMALL_CASES, Case, difference, feed_forwards, projections, run
from torch import Tensor

from mono_internvl.experts import Routing, registry, triton_experts
from mono_internvl.experts.pairs import SwiGLUPair, expert_pair

CASES = {case.name: case for case in SMALL_CASES}


def gap(case: Case, experts: Any) -> float:
    """To eager, over the output and every gradient."""
    return difference(run("triton", case, experts), run("eager", case, experts))


def swap_experts(patch: pytest.MonkeyPatch) -> None:
    """The text rows meet the visual weights."""
    right = triton_experts._hidden
    patch.setattr(triton_experts, "_hidden", lambda x, w, *rest: right(x, w[2:] + w[:2], *rest))


def drop_tail_tile(patch: pytest.MonkeyPatch) -> None:
    """One program too few."""
    right = triton_experts._grid
    patch.setattr(triton_experts, "_grid", lambda *args: (right(*args)[0] - 1,))


def give_stale_output(patch: pytest.MonkeyPatch) -> None:
    """The rows of the first product, whatever comes later."""
    right, kept = triton_experts._linear, {}

    def wrong(*args: Any) -> Tensor:
        y = right(*args)
        return kept.setdefault(y.shape, y)

    patch.setattr(triton_experts, "_linear", wrong)


def forget_order_in_weight_gradient(patch: pytest.MonkeyPatch) -> None:
    """Sorted rows taken for rows of the stream."""
    right = triton_experts._weight_gradient
    patch.setattr(
        triton_experts, "_weight_gradient", lambda dy, x, order, *rest: right(dy, x, None, *rest)
    )


def swap_gate_and_up_gradients(patch: pytest.MonkeyPatch) -> None:
    """In the backward sweep."""
    right = triton_experts._hidden_backward

    def wrong(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        hidden, d_gate, d_up = right(*args)
        return hidden, d_up, d_gate

    patch.setattr(triton_experts, "_hidden_backward", wrong)


def fault_gaps(case: Case) -> dict[str, float]:
    """Gap of each planted fault."""
    faults: tuple[Callable[[pytest.MonkeyPatch], None], ...] = (
        swap_experts,
        drop_tail_tile,
        give_stale_output,
        forget_order_in_weight_gradient,
        swap_gate_and_up_gradients,
    )
    found = {}
    for fault in faults:
        with pytest.MonkeyPatch.context() as patch:
            fault(patch)
            found[fault.__name__] = gap(case, feed_forwards(case))
    return found


def frozen_gradients(case: Case) -> list[list[int]]:
    """Row ranges of the weight gradients that were made, the text expert being frozen."""
    made: list[list[int]] = []
    right = triton_experts._weight_gradient

    def counting(dy: Tensor, x: Tensor, order: Tensor, *rest: Any) -> Tensor:
        made.append(list(rest[:2]))
        return right(dy, x, order, *rest)

    experts = feed_forwards(case)
    experts[0].requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_experts, "_weight_gradient", counting)
        run("triton", case, experts)
    return made


def compiled_gap(case: Case) -> float:
    """Of `torch.compile` in one graph, values and the gradient of the rows."""
    experts = feed_forwards(case)
    pair = expert_pair(*experts)
    assert isinstance(pair, SwiGLUPair)
    routing = Routing.from_mask(case.is_visual)
    x = torch.randn(case.is_visual.numel(), case.width, requires_grad=True)
    compiled = torch.compile(triton_experts.swiglu, backend="aot_eager", fullgraph=True)
    y, expected = compiled(x, routing, pair), triton_experts.swiglu(x, routing, pair)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    (dx_expected,) = torch.autograd.grad(expected.square().sum(), x)
    return float((y - expected).abs().max() + (dx - dx_expected).abs().max())


def main() -> None:
    """Print one JSON object."""
    on_cpu = dataclasses.replace(registry._ENTRIES["triton"], devices=("cpu",))
    registry._ENTRIES["triton"] = on_cpu
    torch.use_deterministic_algorithms(True)  # fills what is uninitialised with NaN
    runs = CASES["runs"]
    found: dict[str, Any] = {"float32": {}}
    for name, case in CASES.items():
        experts = [feed_forwards(case)]
        if name in ("runs", "odd widths", "no visual", "all visual"):
            experts += [projections(case, True), projections(case, False)]
        found["float32"][name] = max(gap(case, e) for e in experts)
    for dtype in (torch.bfloat16, torch.float16):
        case = CASES["tail of one row"]
        found[str(dtype).removeprefix("torch.")] = {
            case.name: gap(case, feed_forwards(case, dtype))
        }
    found["faults"] = fault_gaps(runs)
    found["frozen"] = frozen_gradients(runs)
    found["compiled"] = compiled_gap(runs)
    print(json.dumps(found))


if __name__ == "__main__":
    assert triton_experts.IS_INTERPRETED
    main()
