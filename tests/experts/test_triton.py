"""The fused kernels: interpreted on a CPU, compiled for devices that are not here, run on a GPU."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
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
    route_all,
    run,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mono_internvl.errors import ExpertsUnavailable
from mono_internvl.experts import Routing, check_implementation, registry
from mono_internvl.model.layers import route

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (extra `gpu`)")
needs_gpu = pytest.mark.skipif(
    not (HAS_TRITON and torch.cuda.is_available()), reason="needs a CUDA device and triton"
)
CASES = [case.name for case in SMALL_CASES]
GPU_CASES = (
    *SMALL_CASES,
    *LARGE_CASES,
    Case("wide", SMALL_CASES[8].is_visual.repeat(40), 512, 1024),
    Case("wide, odd", SMALL_CASES[8].is_visual.repeat(40), 520, 1032),
)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Gaps to eager of the interpreted kernels; a process of its own, as Triton decides once."""
    has_old_triton = version("triton").startswith("3.6.")
    if has_old_triton and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton 3.6 interprets with numpy < 2.4 only; it compiles with any")
    script = Path(__file__).with_name("interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    process = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


@needs_triton
def test_interpreted_kernels_equal_eager(interpreted: dict[str, Any]) -> None:
    assert list(interpreted["float32"]) == CASES
    for dtype in ("float32", "bfloat16", "float16"):
        limit = TOLERANCE[getattr(torch, dtype)]
        assert {k: v for k, v in interpreted[dtype].items() if not v <= limit} == {}, dtype


@needs_triton
def test_tolerance_rejects_fault_in_kernels(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["faults"]) == 5
    for fault, gap in interpreted["faults"].items():
        assert math.isinf(gap) or gap > 10 * TOLERANCE[torch.bfloat16], fault


@needs_triton
def test_kernels_make_no_gradient_for_a_frozen_expert(interpreted: dict[str, Any]) -> None:
    runs = next(case for case in SMALL_CASES if case.name == "runs")
    num_text = int((~runs.is_visual).sum())
    assert interpreted["frozen"] == [[num_text, runs.is_visual.numel()]] * 3


@needs_triton
def test_kernels_compile_into_one_graph(interpreted: dict[str, Any]) -> None:
    assert interpreted["compiled"] < 1e-5


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets here")
def test_kernels_compile_ahead_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import aot

    matrix_units = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}
    for kernel in aot.FLAGS:
        for capability, unit in matrix_units.items():
            compiled = aot.compile_kernel(kernel, torch.bfloat16, capability)
            ptx = compiled.asm["ptx"]
            what = f"{kernel} for sm_{capability}"
            assert len(compiled.asm["cubin"]) > 0, what
            assert compiled.metadata.shared <= aot.SHARED_BYTES[capability], what
            assert re.search(unit, ptx), f"{what}: no matrix instruction"
            assert re.search(r"cp\.async\.cg[^;]*0x10", ptx), f"{what}: no wide copies"
            assert ".local " not in ptx, f"{what}: registers spill"
        exact = aot.compile_kernel(kernel, torch.float32, 80)
        assert exact.metadata.shared <= aot.SHARED_BYTES[80], kernel
    assert aot.compile_kernel("hidden", torch.bfloat16, 90, rows=5).asm["cubin"]
    backward = aot.compile_kernel("linear", torch.bfloat16, 90, strides=aot.TRANSPOSED)
    assert re.search(matrix_units[90], backward.asm["ptx"])
    assert re.search(r"cp\.async\.cg[^;]*0x10", backward.asm["ptx"])
    assert ".local " not in backward.asm["ptx"]


@needs_triton
@pytest.mark.parametrize("frozen", ["", "0.", "1.", "0.gate_proj", "down_proj", "weight", "bias"])
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_operators_count_the_flops_of_eager(
    case: Case, frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = dataclasses.replace(registry._ENTRIES["triton"], devices=("meta",))
    monkeypatch.setitem(registry._ENTRIES, "triton", entry)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # "meta" is unknown to it
    for experts in (feed_forwards(case), projections(case, True), projections(case, False)):
        for name, parameter in experts.named_parameters():
            parameter.requires_grad_(not frozen or frozen not in name)
        experts.to("meta")
        found, expected = _flops("triton", case, experts), _flops("eager", case, experts)
        assert found == expected and min(found) > 0


def _flops(name: str, case: Case, experts: nn.ModuleList) -> tuple[int, int]:
    """Of the forward and of the backward pass, on tensors without data."""
    x = torch.empty(case.is_visual.numel(), case.width, device="meta", requires_grad=True)
    routing = Routing.from_mask(case.is_visual).to(x.device).by(name)
    with FlopCounterMode(display=False) as forward:
        y = route_all(x, routing, *experts)
    with FlopCounterMode(display=False) as backward:
        y.backward(torch.empty_like(y))
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.skipif(HAS_TRITON, reason="triton is installed")
def test_triton_by_name_without_the_package_says_what_to_install() -> None:
    with pytest.raises(ExpertsUnavailable, match=r"mono-internvl\[gpu\]"):
        check_implementation("triton")


@needs_triton
def test_triton_by_name_on_a_cpu_is_refused() -> None:
    check_implementation("triton")
    case = SMALL_CASES[8]
    routing = Routing.from_mask(case.is_visual).by("triton")
    with pytest.raises(ExpertsUnavailable, match="rows are on cpu; it needs cuda"):
        route(torch.randn(case.is_visual.numel(), case.width), routing, *feed_forwards(case))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_kernels_equal_eager_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    for experts in (feed_forwards(case, dtype), projections(case, True, dtype)):
        found, expected = run("triton", case, experts, "cuda"), run("eager", case, experts, "cuda")
        assert difference(found, expected) <= TOLERANCE[dtype]
