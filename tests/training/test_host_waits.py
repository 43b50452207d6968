"""How often the host waits for the device in a training step: once, to read what is logged.

Without a GPU the model is put on the meta device, whose tensors have no values: whatever asks for
one (`item`, `bool`, `nonzero`, `cpu`, an index by a mask) raises there. Reading what is logged is
let through and counted.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from torch import Tensor, nn

from mono_internvl.data.batches import Batch
from mono_internvl.training.loop import _Loop
from mono_internvl.training.optimizer import optimizer_of
from mono_internvl.training.rules import apply_rules
from mono_internvl.training.state_folders import StateFolders

WAITS_PER_STEP = 1
ACCUMULATION = 2
STAGE = tiny_runs.tiny_stage(steps=4, batch_size=8, accumulation=ACCUMULATION, data="images.json")


class _Steps:
    """Steps of a stage on a device, their batches read before."""

    def __init__(self, start: Path, data: Path, run: Path, device: str):
        home = "cpu" if device == "meta" else device
        self.loop = _Loop(STAGE, start, data, run, home, "sdpa", None, "ddp", StateFolders(run))
        self.loop.model.to(device).train()
        self.loop.device = device
        groups = apply_rules(self.loop.model, self.loop.model.config, self.loop.stage)
        self.optimizer = optimizer_of(self.loop.model, groups, self.loop.stage)
        if device == "meta":  # it has no fused optimizer
            for group in self.optimizer.param_groups:
                group["fused"] = False
        self.batches: Iterator[Sequence[Batch]] = iter(list(islice(self.loop._steps(0), 4)))

    def take(self, step: int) -> dict[str, Any]:
        return self.loop._step(step, self.loop._loss_of(), self.optimizer, self.batches)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many values were read at once, for each time that the meta device was read."""
    found: list[int] = []
    plain = Tensor.tolist

    def tolist(self: Tensor) -> Any:
        if self.device.type != "meta":
            return plain(self)
        found.append(self.numel())
        return [1.0] * self.numel()

    monkeypatch.setattr(Tensor, "tolist", tolist)
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    return found


def test_step_waits_once(reads: list[int], start: Path, data: Path, tmp_path: Path) -> None:
    steps = _Steps(start, data, tmp_path, "meta")
    assert steps.take(0)["images"] == 8
    assert len(reads) == WAITS_PER_STEP
    assert steps.take(1)["loss"] == 1.0
    assert len(reads) == 2 * WAITS_PER_STEP


@pytest.mark.parametrize("field", ["routing", "labelled"])
def test_step_without_what_the_batch_brings_waits_in_the_model(
    monkeypatch: pytest.MonkeyPatch,
    reads: list[int],
    start: Path,
    data: Path,
    tmp_path: Path,
    field: str,
) -> None:
    steps, to = _Steps(start, data, tmp_path, "meta"), Batch.to
    monkeypatch.setattr(
        Batch, "to", lambda self, device: dataclasses.replace(to(self, device), **{field: None})
    )
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        steps.take(0)


def test_loss_that_is_read_in_the_step_is_noticed(
    monkeypatch: pytest.MonkeyPatch, reads: list[int], start: Path, data: Path, tmp_path: Path
) -> None:
    steps, clip = _Steps(start, data, tmp_path, "meta"), nn.utils.clip_grad_norm_

    def read(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        norm = clip(parameters, max_norm)
        assert norm.item() > 0
        return norm

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", read)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        steps.take(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_step_on_cuda_waits_once(start: Path, data: Path, tmp_path: Path) -> None:
    steps = _Steps(start, data, tmp_path, "cuda")
    steps.take(0)  # makes the optimizer's moments
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            steps.take(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in found if "synchroniz" in str(one.message)]
    assert len(waits) == WAITS_PER_STEP, waits
