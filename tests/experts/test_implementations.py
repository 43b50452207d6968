"""Every implementation gives eager's numbers, values and gradients, and a fault in it shows."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import toy_experts
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

from mono_internvl.bench.dense import DENSE, register_dense
from mono_internvl.errors import ExpertsUnavailable
from mono_internvl.experts import Routing, check_implementation, registry
from mono_internvl.experts.pairs import LinearPair
from mono_internvl.experts.registry import Entry
from mono_internvl.model.layers import FeedForward, route

TOY = toy_experts.register()
register_dense()
ON_CPU = (TOY, DENSE)
CASES = (*SMALL_CASES, *LARGE_CASES)
RUNS = next(case for case in SMALL_CASES if case.name == "runs")


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_implementation_equals_eager(case: Case, name: str) -> None:
    for experts in (feed_forwards(case), projections(case, True), projections(case, False)):
        gap = difference(run(name, case, experts), run("eager", case, experts))
        assert gap <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ON_CPU)
def test_implementation_equals_eager_in_bf16(name: str) -> None:
    for experts in (feed_forwards(RUNS, torch.bfloat16), projections(RUNS, True, torch.bfloat16)):
        gap = difference(run(name, RUNS, experts), run("eager", RUNS, experts))
        assert gap <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("name", ON_CPU)
def test_implementation_equals_eager_under_autocast(name: str) -> None:
    for experts in (feed_forwards(RUNS), projections(RUNS, True)):
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = run("eager", RUNS, experts), run(name, RUNS, experts)
        assert found["output"] is not None and found["output"].dtype == torch.bfloat16
        assert difference(found, expected) <= TOLERANCE[torch.bfloat16]


def _swap_experts(patch: pytest.MonkeyPatch) -> None:
    right = toy_experts.products

    def wrong(x: Tensor, num_text: int, pair: LinearPair) -> Tensor:
        return right(x, num_text, LinearPair(pair.visual, pair.text))

    patch.setattr(toy_experts, "products", wrong)


def _drop_last_row(patch: pytest.MonkeyPatch) -> None:
    right = toy_experts.products

    def wrong(*args: Any) -> Tensor:
        y = right(*args)
        return torch.cat((y[:-1], torch.zeros_like(y[-1:])))

    patch.setattr(toy_experts, "products", wrong)


def _give_last_output_again(patch: pytest.MonkeyPatch) -> None:
    right, kept = toy_experts.products, {}

    def wrong(*args: Any) -> Tensor:
        y = right(*args)
        return kept.setdefault(tuple(y.shape), y.detach()) + 0 * y

    patch.setattr(toy_experts, "products", wrong)


def _leave_rows_sorted(patch: pytest.MonkeyPatch) -> None:
    right = toy_experts.gather
    patch.setattr(toy_experts, "gather", lambda x, rows: right(x, None))


@pytest.mark.parametrize(
    "fault", [_swap_experts, _drop_last_row, _give_last_output_again, _leave_rows_sorted]
)
@pytest.mark.parametrize("case", [RUNS, LARGE_CASES[1]], ids=lambda case: case.name)
def test_tolerance_rejects_fault(
    fault: Callable[[pytest.MonkeyPatch], None], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = feed_forwards(case)
    expected = run("eager", case, experts)
    fault(monkeypatch)
    gap = difference(run(TOY, case, experts), expected)
    assert gap > 100 * TOLERANCE[torch.float32]
    assert gap > TOLERANCE[torch.bfloat16]


def _routed(name: str, experts: nn.ModuleList) -> Tensor:
    x = torch.randn(RUNS.is_visual.numel(), RUNS.width, generator=torch.Generator().manual_seed(2))
    return route(x, Routing.from_mask(RUNS.is_visual).by(name), *experts)


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
    with pytest.raises(ExpertsUnavailable, match="take experts_implementation='auto'"):
        _routed(TOY, experts)
    assert torch.equal(_routed("auto", experts), _routed("eager", experts))


def test_subclassed_projection_is_told_apart() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    pair = nn.ModuleList((nn.Linear(RUNS.width, 8), Doubling(RUNS.width, 8)))
    with pytest.raises(ExpertsUnavailable, match="Doubling"):
        _routed(TOY, pair)


def test_unknown_name_is_refused_with_the_names() -> None:
    with pytest.raises(ExpertsUnavailable, match=r"'fused'.*auto, eager, triton"):
        check_implementation("fused")
    for name in ("auto", "eager", TOY):
        check_implementation(name)


def test_auto_takes_the_default_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    right = toy_experts.swiglu
    monkeypatch.setattr(
        toy_experts, "swiglu", lambda x, *rest: calls.append(len(x)) or right(x, *rest)
    )
    experts, rows = feed_forwards(RUNS), RUNS.is_visual.numel()
    expected = _routed("auto", experts)
    assert calls == [] and registry.default_implementation("cpu") == "eager"
    faster = dataclasses.replace(toy_experts.ENTRY, default_devices=("cpu",))
    monkeypatch.setitem(registry._ENTRIES, TOY, faster)
    torch.testing.assert_close(_routed("auto", experts), expected, atol=1e-5, rtol=0)
    assert calls == [rows] and registry.default_implementation("cuda") == "eager"
    _hook_projection(experts)
    assert torch.equal(_routed("auto", experts), _routed("eager", experts))
    assert calls == [rows]


def test_entries_that_contradict_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", {"first": Entry("a", ("cpu",), ("cpu",))})
    for name, entry, reason in (
        ("auto", Entry("b", ("cpu",)), "registered already"),
        ("first", Entry("b", ("cpu",)), "registered already"),
        ("second", Entry("b", ("cpu",), ("cuda",)), "does not run on its default device"),
        ("second", Entry("b", ("cpu",), ("cpu",)), "'first' is the default on 'cpu'"),
    ):
        with pytest.raises(ValueError, match=reason):
            registry.register_implementation(name, entry)
    assert registry.implementation_names() == ("auto", "eager", "first")


def test_dense_runs_both_experts_on_all_rows() -> None:
    experts = feed_forwards(RUNS)
    assert isinstance(experts[1], FeedForward)
    experts[1].down_proj.weight.data.fill_(float("inf"))
    assert not torch.isfinite(_routed(DENSE, experts)).any()
    assert torch.isfinite(_routed(TOY, experts)[~RUNS.is_visual]).all()
