"""Every path gives eager's numbers, values and gradients, and a fault in it shows."""

import copy
from collections.abc import Callable

import pytest
import torch
from expert_cases import (
    LARGE_CASES,
    SMALL_CASES,
    TOLERANCE,
    Case,
    difference,
    feed_forwards,
    projections,
    run,
)
from torch import Tensor, nn

from mono_internvl.errors import ExpertPathUnavailable
from mono_internvl.experts import EXPERT_PATHS, Routing, check_expert_path, crossovers, grouped
from mono_internvl.model.layers import FeedForward, route

CPU_PATHS = ("grouped", "dense")
CASES = (*SMALL_CASES, *LARGE_CASES)
RUNS = next(case for case in SMALL_CASES if case.name == "runs")


@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_path_equals_eager(case: Case, path: str) -> None:
    for experts in (feed_forwards(case), projections(case, True), projections(case, False)):
        gap = difference(run(path, case, experts), run("eager", case, experts))
        assert gap <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("path", CPU_PATHS)
def test_path_equals_eager_in_bf16(path: str) -> None:
    for experts in (feed_forwards(RUNS, torch.bfloat16), projections(RUNS, True, torch.bfloat16)):
        gap = difference(run(path, RUNS, experts), run("eager", RUNS, experts))
        assert gap <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("path", CPU_PATHS)
def test_path_equals_eager_under_autocast(path: str) -> None:
    for experts in (feed_forwards(RUNS), projections(RUNS, True)):
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = run("eager", RUNS, experts), run(path, RUNS, experts)
        assert found["output"] is not None and found["output"].dtype == torch.bfloat16
        assert difference(found, expected) <= TOLERANCE[torch.bfloat16]


def test_grouped_forward_equals_eager_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        experts = feed_forwards(LARGE_CASES[0], dtype)
        found, expected = (
            run(path, LARGE_CASES[0], experts)["output"] for path in ("grouped", "eager")
        )
        assert found is not None and expected is not None and torch.equal(found, expected)


def _swap_experts(patch: pytest.MonkeyPatch) -> None:
    right = grouped._products
    patch.setattr(
        grouped,
        "_products",
        lambda x, n, text, visual, *bias, **onto: right(x, n, visual, text, *bias, **onto),
    )


def _drop_last_row(patch: pytest.MonkeyPatch) -> None:
    right = grouped._products

    def wrong(x: Tensor, num_text: int, *rest: Tensor, **onto: Tensor) -> Tensor:
        y = right(x, num_text, *rest, **onto)
        y[-1] = 0
        return y

    patch.setattr(grouped, "_products", wrong)


def _give_last_output_again(patch: pytest.MonkeyPatch) -> None:
    right, kept = grouped._products, {}

    def wrong(x: Tensor, num_text: int, *rest: Tensor, **onto: Tensor) -> Tensor:
        y = right(x, num_text, *rest, **onto)
        return kept.setdefault(tuple(y.shape), y)

    patch.setattr(grouped, "_products", wrong)


def _leave_rows_sorted(patch: pytest.MonkeyPatch) -> None:
    right = grouped._gather
    patch.setattr(grouped, "_gather", lambda x, rows: right(x, None))


def _swap_weight_gradients(patch: pytest.MonkeyPatch) -> None:
    right = grouped._weight_gradients
    patch.setattr(grouped, "_weight_gradients", lambda *args: right(*args)[::-1])


@pytest.mark.parametrize(
    "fault",
    [
        _swap_experts,
        _drop_last_row,
        _give_last_output_again,
        _leave_rows_sorted,
        _swap_weight_gradients,
    ],
)
@pytest.mark.parametrize("case", [RUNS, LARGE_CASES[1]], ids=lambda case: case.name)
def test_tolerance_rejects_fault(
    fault: Callable[[pytest.MonkeyPatch], None], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = feed_forwards(case)
    expected = run("eager", case, experts)
    fault(monkeypatch)
    gap = difference(run("grouped", case, experts), expected)
    assert gap > 100 * TOLERANCE[torch.float32]
    assert gap > TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("frozen", ["0.", "1."])
def test_grouped_makes_no_gradient_for_a_frozen_expert(
    frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, bool]] = []
    right = grouped._weight_gradients

    def counting(dy: Tensor, x: Tensor, num_text: int, wanted: tuple[bool, bool]) -> object:
        asked.append(wanted)
        return right(dy, x, num_text, wanted)

    monkeypatch.setattr(grouped, "_weight_gradients", counting)
    experts = feed_forwards(RUNS)
    for name, p in experts.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    found = run("grouped", RUNS, experts)
    assert asked == [(frozen != "0.", frozen != "1.")] * 3
    assert {name for name, g in found.items() if g is None} == {
        f"{frozen}{name}_proj.weight" for name in ("gate", "up", "down")
    }
    assert difference(found, run("eager", RUNS, experts)) <= TOLERANCE[torch.float32]


def test_grouped_takes_a_gradient_without_strides() -> None:
    experts = feed_forwards(RUNS)
    x = torch.randn(RUNS.is_visual.numel(), RUNS.width)
    for case in (RUNS.is_visual, torch.zeros_like(RUNS.is_visual)):
        gradients = []
        for path in ("eager", "grouped"):
            experts.zero_grad()
            route(x, Routing.from_mask(case).by(path), *experts).sum().backward()
            gradients.append(experts[0].up_proj.weight.grad.clone())
        assert torch.allclose(*gradients, atol=1e-4)


def _routed(path: str, experts: nn.ModuleList) -> Tensor:
    x = torch.randn(RUNS.is_visual.numel(), RUNS.width, generator=torch.Generator().manual_seed(2))
    return route(x, Routing.from_mask(RUNS.is_visual).by(path), *experts)


def _wrap_projection(experts: nn.ModuleList) -> None:
    experts[1].up_proj = nn.Sequential(experts[1].up_proj, nn.Identity())


def _hook_projection(experts: nn.ModuleList) -> None:
    experts[0].down_proj.register_forward_hook(lambda module, args, out: 2 * out)


def _hook_expert(experts: nn.ModuleList) -> None:
    experts[0].register_forward_hook(lambda module, args, out: 2 * out)


def _hook_activation(experts: nn.ModuleList) -> None:
    experts[0].act_fn.register_forward_hook(lambda module, args, out: 2 * out)


def _use_gelu(experts: nn.ModuleList) -> None:
    experts[0].act_fn = experts[1].act_fn = nn.GELU()


def _add_bias(experts: nn.ModuleList) -> None:
    experts[0].up_proj = nn.Linear(RUNS.width, RUNS.ffn_width)


@pytest.mark.parametrize(
    "change",
    [_wrap_projection, _hook_projection, _hook_expert, _hook_activation, _use_gelu, _add_bias],
)
def test_module_that_is_more_than_its_weights_is_refused_by_name(
    change: Callable[[nn.ModuleList], None],
) -> None:
    experts = feed_forwards(RUNS)
    change(experts)
    with pytest.raises(ExpertPathUnavailable, match="only eager handles"):
        _routed("grouped", experts)
    assert torch.equal(_routed("auto", experts), _routed("eager", experts))


def test_copied_and_subclassed_experts_are_told_apart() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    pair = nn.ModuleList((nn.Linear(RUNS.width, 8), Doubling(RUNS.width, 8)))
    with pytest.raises(ExpertPathUnavailable, match="Doubling"):
        _routed("grouped", pair)
    assert torch.equal(
        _routed("grouped", copy.deepcopy(feed_forwards(RUNS))),
        _routed("grouped", feed_forwards(RUNS)),
    )


def test_unknown_path_is_refused_with_the_names() -> None:
    with pytest.raises(
        ExpertPathUnavailable, match=r"'fused'.*auto, eager, grouped, triton, dense"
    ):
        check_expert_path("fused")
    for name in EXPERT_PATHS:
        if name != "triton":
            check_expert_path(name)


@pytest.mark.parametrize("kind", ["swiglu", "linear"])
@pytest.mark.parametrize("training", [True, False])
def test_auto_goes_by_the_table(training: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = (crossovers.Crossover("cpu", training, 50, 10, "grouped", "made up"),)
    monkeypatch.setattr(crossovers, "CROSSOVERS", table)
    calls: list[int] = []
    right = getattr(grouped, kind)
    monkeypatch.setattr(grouped, kind, lambda x, *rest: calls.append(len(x)) or right(x, *rest))
    experts = feed_forwards(RUNS) if kind == "swiglu" else projections(RUNS, True)
    with torch.set_grad_enabled(training):
        for num_text, num_visual in ((40, 10), (41, 9), (39, 10), (30, 30)):
            mask = torch.arange(num_text + num_visual) < num_visual
            route(torch.randn(len(mask), RUNS.width), Routing.from_mask(mask).by("auto"), *experts)
    with torch.set_grad_enabled(not training):
        mask = torch.arange(60) < 30
        route(torch.randn(60, RUNS.width), Routing.from_mask(mask).by("auto"), *experts)
    assert calls == [50, 60]


def test_dense_runs_both_experts_on_all_rows() -> None:
    experts = feed_forwards(RUNS)
    assert isinstance(experts[1], FeedForward)
    experts[1].down_proj.weight.data.fill_(float("inf"))
    assert not torch.isfinite(_routed("dense", experts)).any()
    assert torch.isfinite(_routed("grouped", experts)[~RUNS.is_visual]).all()
