"""The loop on CUDA devices: the numbers of the CPU, resumed, in two processes; needs one device."""

import dataclasses
from pathlib import Path

import loop_processes
import pytest
import tiny_runs
import torch
from interrupted import interrupt

from mono_internvl.distributed import run_processes
from mono_internvl.training.loop import train_stage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 would round products to 10 bits."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_training_step_on_cuda_equals_cpu(start: Path, data: Path, tmp_path: Path) -> None:
    stage = tiny_runs.tiny_stage(steps=2, warmup_steps=0, schedule="constant")
    rows = {
        device: tiny_runs.metric_rows(
            train_stage(stage, start, data, tmp_path / device, device=device).metrics
        )
        for device in ("cpu", "cuda")
    }
    for cpu, cuda in zip(rows["cpu"], rows["cuda"], strict=True):
        assert cuda["loss"] == pytest.approx(cpu["loss"], abs=1e-3)
        assert cuda["grad_norm"] == pytest.approx(cpu["grad_norm"], rel=1e-2)
    half = dataclasses.replace(stage, precision="bf16")
    (_, last) = tiny_runs.metric_rows(
        train_stage(half, start, data, tmp_path / "half", device="cuda").metrics
    )
    assert last["loss"] == pytest.approx(rows["cpu"][1]["loss"], rel=0.1)


def test_run_on_cuda_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    stage = tiny_runs.tiny_stage(steps=8, checkpoint_every=4)
    whole = train_stage(stage, start, data, tmp_path / "whole", device="cuda")
    interrupt(monkeypatch, 6, stage, start, data, tmp_path / "parts", device="cuda")
    parts = train_stage(stage, start, data, tmp_path / "parts", device="cuda")
    assert parts.resumed_at == 4
    # Sums on a GPU may be taken in another order from run to run.
    for one, other in zip(
        tiny_runs.metric_rows(whole.metrics), tiny_runs.metric_rows(parts.metrics), strict=True
    ):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-3)
        assert other["learning_rate_share"] == one["learning_rate_share"]


def test_two_processes_on_cuda_equal_one(start: Path, data: Path, tmp_path: Path) -> None:
    """Each on a GPU of its own, or both on the only one (then gloo moves the tensors)."""
    stage = tiny_runs.tiny_stage(steps=4)
    alone = train_stage(stage, start, data, tmp_path / "alone", device="cuda")
    pair = tmp_path / "pair"
    run_processes(loop_processes.train_each, 2, [(stage, pair)], start, data, "cuda")
    rows = tiny_runs.metric_rows(pair / "metrics.jsonl")
    for one, two in zip(tiny_runs.metric_rows(alone.metrics), rows, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-3)
        assert (two["tokens"], two["images"]) == (one["tokens"], one["images"])
