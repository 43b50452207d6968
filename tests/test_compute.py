"""What a machine can do decides what is computed with; every part of that can be asked for."""

import json
import math

import pytest
import torch

from mono_internvl import compute
from mono_internvl.compute import ComputePlan, choose_device, make_plan
from mono_internvl.distributed import own_device
from mono_internvl.errors import ConfigError


def _machine(
    monkeypatch: pytest.MonkeyPatch,
    *,
    bf16_cost: float = 0.4,
    cores: int = 2,
    free_bytes: int | None = None,
    accelerator: str | None = None,
) -> None:
    """Stand on a machine that can do so much."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(compute, "bf16_cost", lambda device_type: bf16_cost)
    monkeypatch.setattr(compute, "cores", lambda: cores)
    monkeypatch.setattr(compute, "available_bytes", lambda: free_bytes)
    for kind in compute.ACCELERATORS:
        count = 2 if kind == accelerator else 0
        monkeypatch.setattr(getattr(torch, kind), "device_count", lambda count=count: count)


@pytest.mark.parametrize(
    ("cost", "precision", "attention", "reason"),
    [
        (0.2, "bf16", "blocked", "bf16 products 5.0x faster"),
        (0.8, "bf16", "blocked", "bf16 products 1.2x faster"),
        (0.95, "fp32", "sdpa", "bf16 products no faster"),
        (40.2, "fp32", "sdpa", "bf16 products 40x slower"),
        (math.inf, "fp32", "sdpa", "no bf16 here"),
    ],
)
def test_plan_takes_the_faster_precision_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, cost: float, precision: str, attention: str, reason: str
) -> None:
    _machine(monkeypatch, bf16_cost=cost)
    plan = make_plan()
    assert (plan.precision, plan.attention, plan.reason) == (precision, attention, reason)
    assert plan.bf16_cost == (None if math.isinf(cost) else cost)
    json.dumps(plan.to_dict(), allow_nan=False)


def test_plan_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, bf16_cost=40.2)
    assert make_plan(batch_size=8).describe() == (
        "plan: cpu, fp32 (bf16 products 40x slower), attention sdpa, experts eager, "
        "2 processes x 1 thread"
    )
    assert make_plan(precision="bf16").describe() == (
        "plan: cpu, bf16, attention blocked, experts eager, 1 process x 2 threads"
    )


def test_plan_obeys_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, bf16_cost=40.0, cores=8)
    plan = make_plan(
        "cpu", "bf16", attention="eager", experts="triton", threads=3, processes=5, batch_size=8
    )
    assert plan == ComputePlan(
        device="cpu",
        precision="bf16",
        attention="eager",
        experts="triton",
        threads=3,
        processes=5,
    )


@pytest.mark.parametrize(
    ("cores", "batch_size", "processes", "threads"),
    [(1, 8, 1, 1), (2, 8, 2, 1), (6, 8, 4, 1), (8, 8, 8, 1), (64, 8, 8, 8), (7, 1, 1, 7)],
)
def test_plan_uses_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, batch_size: int, processes: int, threads: int
) -> None:
    _machine(monkeypatch, cores=cores)
    plan = make_plan(batch_size=batch_size)
    assert (plan.processes, plan.threads) == (processes, threads)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert make_plan(batch_size=batch_size).threads == 1, "a user's setting counts"


def test_plan_quantizes_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, bf16_cost=40.0, free_bytes=8_000_000_000)
    assert make_plan(fp32_bytes=6_000_000_000).precision == "fp32"
    plan = make_plan(fp32_bytes=12_400_000_000)
    assert plan.precision == "int8"
    assert plan.reason == "bf16 products 40x slower, fp32 needs 15.5 GB of 8.0 GB"
    assert make_plan(precision="fp32", fp32_bytes=12_400_000_000).precision == "fp32", "asked for"
    assert make_plan().precision == "fp32", "training keeps fp32 weights"
    _machine(monkeypatch, free_bytes=8_000_000_000)
    assert make_plan(fp32_bytes=12_400_000_000).precision == "bf16", "bf16 weights are half of that"


@pytest.mark.parametrize("kind", compute.ACCELERATORS)
def test_plan_prefers_an_accelerator(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    _machine(monkeypatch, accelerator=kind, bf16_cost=1.0)
    plan = make_plan(batch_size=8)
    assert (plan.device, plan.precision, plan.processes) == (kind, "bf16", 1)
    assert choose_device(f"{kind}:1") == torch.device(kind, 1)
    with pytest.raises(ConfigError, match=f"device='{kind}:2': this machine has 2 {kind} devices"):
        choose_device(f"{kind}:2")
    assert make_plan("cpu").device == "cpu"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"precision": "fp8"}, "precision='fp8'; expected one of auto, bf16, fp32"),
        ({"precision": "int8"}, "precision='int8'; expected one of auto, bf16, fp32"),
        ({"threads": 0}, "threads=0"),
        ({"processes": -1}, "processes=-1"),
    ],
)
def test_plan_refuses_what_it_cannot_do(arguments: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_plan("cpu", **arguments)  # type: ignore[arg-type]


def test_plan_in_another_precision_changes_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, bf16_cost=40.0)
    begun = make_plan().with_precision("bf16")
    assert (begun.precision, begun.attention) == ("bf16", "blocked")
    assert make_plan(attention="eager").with_precision("bf16").attention == "eager"


def test_bf16_cost_is_the_median_of_timed_products(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {torch.float32: 1.0, torch.bfloat16: 40.0}
    calls: list[torch.dtype] = []

    def seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
        calls.append(x.dtype)
        is_outlier = len(calls) in (2, 4)  # the first bf16 product compiles, the next is cut off
        return slow[x.dtype] * (1000 if is_outlier else 1)

    monkeypatch.setattr(compute, "seconds_of_product", seconds)
    compute.bf16_cost.cache_clear()
    assert compute.bf16_cost("cpu") == 40
    assert compute.bf16_cost("cpu") == 40
    assert len(calls) == 12, "measured once"
    compute.bf16_cost.cache_clear()


def test_bf16_cost_is_infinite_where_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
        raise RuntimeError('"addmm" not implemented for BFloat16')

    monkeypatch.setattr(compute, "seconds_of_product", seconds)
    compute.bf16_cost.cache_clear()
    assert compute.bf16_cost("cpu") == math.inf
    compute.bf16_cost.cache_clear()


def test_this_machine_is_measured() -> None:
    assert 0 < compute.bf16_cost("cpu") < 1000
    assert compute.cores() >= 1
    free = compute.available_bytes()
    assert free is None or free > 1_000_000
    assert compute.cpu_capability()


@pytest.mark.parametrize("name", ["abacus", "meta", "", "cuda:x", "cuda:0", "cuda"])
def test_choose_device_refuses_the_unknown_and_the_absent(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=f"device='{name}'"):
        choose_device(name)
    with pytest.raises(ConfigError, match=f"device='{name}'"):
        own_device(name)


def test_own_device_shares_the_gpus_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found.append(own_device("cuda"))
    assert found == ["cuda:0", "cuda:1", "cuda:0"]
    assert own_device("cuda:1") == "cuda:1"
    assert own_device("cpu") == "cpu"
