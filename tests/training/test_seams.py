"""Another objective, another place for states and another parallelism, through the real loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import loop_processes
import pytest
import stored
import tiny_runs
import torch
import toys
from interrupted import interrupt
from safetensors.torch import load_file

from mono_internvl.distributed import run_processes
from mono_internvl.errors import TrainingStateError
from mono_internvl.training.checkpointing import Checkpointing
from mono_internvl.training.loop import train_stage
from mono_internvl.training.objectives.objective import Objective
from mono_internvl.training.parallel import DataParallel, FullyShard, Parallelism
from mono_internvl.training.state_folders import SHARDS, StateFolders

STEADY = tiny_runs.tiny_stage(
    objective=toys.SteadyLogits(), batch_size=4, steps=40, checkpoint_every=5
)
TOLERANCE = 1e-4
"""Two processes add gradients in another order: 1.5e-6 of a loss of 6 over a dozen steps."""


def test_implementations_fit_their_protocols(tmp_path: Path) -> None:
    """What mypy would say, for classes that stand in tests."""
    objectives: list[Objective] = [toys.SteadyLogits()]
    states: list[Checkpointing] = [toys.InMemory(tmp_path), StateFolders(tmp_path)]
    ways: list[Parallelism] = [toys.MeanByHook(), DataParallel(), FullyShard()]
    assert objectives and states and ways


def test_objective_with_a_state_survives_a_kill_of_two_processes(
    start: Path, data: Path, tmp_path: Path
) -> None:
    run_processes(loop_processes.train_each, 2, [(STEADY, tmp_path / "whole")], start, data)
    loop_processes.kill_in_the_middle(2, STEADY, tmp_path / "killed", start, data, rows=12)
    found = StateFolders(tmp_path / "killed").latest()
    assert found is not None and 10 <= found.step < 40
    carried: dict[str, torch.Tensor] = {}
    for file in (found.folder / SHARDS).iterdir():
        carried |= {n: x for n, x in load_file(file).items() if n.startswith("objective.")}
    assert carried["objective.steps"].item() == found.step and carried["objective.mean"] > 0
    loop_processes.train_in(2, STEADY, tmp_path / "killed", start, data)
    whole, killed = (
        tiny_runs.metric_rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")
    )
    assert whole == killed
    train_stage(STEADY, start, data, tmp_path / "alone")
    alone = tiny_runs.metric_rows(tmp_path / "alone" / "metrics.jsonl")
    for one, two in zip(alone, whole, strict=True):
        for name in ("loss", "z", "unsteady"):
            assert two[name] == pytest.approx(one[name], abs=TOLERANCE)


def test_objective_without_its_state_would_go_elsewhere(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    stage = dataclasses.replace(STEADY, steps=8)
    whole = tiny_runs.metric_rows(train_stage(stage, start, data, tmp_path / "whole").metrics)
    interrupt(monkeypatch, 7, stage, start, data, tmp_path / "run")
    state = tmp_path / "run" / "step_00000005"
    stored.change(state, lambda held: held["objective.mean"].add_(1))
    rows = tiny_runs.metric_rows(train_stage(stage, start, data, tmp_path / "run").metrics)
    assert rows[:5] == whole[:5]
    assert rows[5]["z"] == whole[5]["z"] and rows[5]["loss"] != whole[5]["loss"]


def test_objective_has_its_reference(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    objective = toys.SteadyLogits(reference_weight=0.5)
    stage = dataclasses.replace(STEADY, steps=8, objective=objective)
    whole = tiny_runs.metric_rows(train_stage(stage, start, data, tmp_path / "whole").metrics)
    assert whole[0]["away"] == 0 and whole[-1]["away"] > 0
    interrupt(monkeypatch, 7, stage, start, data, tmp_path / "run")
    parts = train_stage(stage, start, data, tmp_path / "run")
    assert parts.resumed_at == 5
    assert tiny_runs.metric_rows(parts.metrics) == whole, "the reference is where the stage began"


def test_run_of_another_objective_is_refused(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    stage, run = dataclasses.replace(STEADY, steps=8), tmp_path / "run"
    interrupt(monkeypatch, 6, stage, start, data, run)
    other = dataclasses.replace(stage, objective=toys.SteadyLogits(weight=0.2))
    for changed in (other, tiny_runs.tiny_stage(steps=8)):
        with pytest.raises(TrainingStateError, match=r"run with .*='?\{?"):
            train_stage(changed, start, data, run)
    stored.change(run / "step_00000005", lambda held: held.pop("objective.steps"))
    with pytest.raises(TrainingStateError, match=r"step_00000005: no steps \(objective\)"):
        train_stage(stage, start, data, run)
    stored.as_written_before(run / "step_00000005")
    with pytest.raises(
        TrainingStateError, match=r"objective\.state: holds .*'mean': \(1,\)\}, the"
    ):
        train_stage(stage, start, data, run)


def test_states_may_be_kept_elsewhere(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    whole = train_stage(STEADY, start, data, tmp_path / "whole")
    run = tmp_path / "run"
    interrupt(monkeypatch, 33, STEADY, start, data, run, checkpointing=toys.InMemory)
    assert {path.name for path in run.iterdir()} == {".lock", "metrics.jsonl"}
    parts = train_stage(STEADY, start, data, run, checkpointing=toys.InMemory)
    assert parts.resumed_at == 30 and not toys.InMemory.kept
    assert tiny_runs.metric_rows(parts.metrics) == tiny_runs.metric_rows(whole.metrics)
    old, new = ((r.checkpoint / "model.safetensors").read_bytes() for r in (whole, parts))
    assert old == new


def test_gradients_may_be_averaged_another_way(start: Path, data: Path, tmp_path: Path) -> None:
    stage = tiny_runs.tiny_stage(data="text.json", steps=6, batch_size=8, accumulation=2)
    train_stage(stage, start, data, tmp_path / "alone")
    run_processes(toys.train_by_hook, 2, stage, start, data, tmp_path / "pair")
    alone, pair = (
        tiny_runs.metric_rows(tmp_path / name / "metrics.jsonl") for name in ("alone", "pair")
    )
    for one, two in zip(alone, pair, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=TOLERANCE)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
