"""The loop in two gloo processes: the numbers of one, the same numbers after a kill."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import loop_processes
import pytest
import tiny_runs
import torch
from failing_process import fail_in_second, note_process
from safetensors.torch import load_file

from mono_internvl.distributed import own_device, run_processes, run_side_by_side
from mono_internvl.errors import RecipeError, TrainingStateError
from mono_internvl.training.loop import train_stage
from mono_internvl.training.state_folders import StateFolders

# Gradients are added up in another order than in one process; over 12 steps of AdamW in fp32 that
# moved the loss, of about 6, by at most 1.5e-6.
LOSS_TOLERANCE = 1e-5

STAGES = {
    # One sample a process: at some steps one has an image and the other has none.
    "mixed": tiny_runs.tiny_stage(batch_size=2),
    "text": tiny_runs.tiny_stage(batch_size=2, data="text.json", steps=4),
    # Only visual parts learn: a process with text alone has nothing to differentiate.
    "visual": tiny_runs.tiny_stage(batch_size=2, rules=tiny_runs.VISION_AND_EXPERTS),
    "accumulated": tiny_runs.tiny_stage(batch_size=8, accumulation=2, loss_weighting="square"),
    "kill": loop_processes.KILLED,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, start: Path, data: Path) -> Path:
    """Folder of the stages' runs, all made by one pair of processes."""
    root = tmp_path_factory.mktemp("pair")
    runs = [(stage, root / name) for name, stage in STAGES.items()]
    run_processes(loop_processes.train_each, 2, runs, start, data)
    return root


def _losses(run: Path) -> torch.Tensor:
    rows = tiny_runs.metric_rows(run / "metrics.jsonl")
    return torch.tensor([row["loss"] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("name", [name for name in STAGES if name != "kill"])
def test_two_processes_give_the_curve_of_one(
    pair: Path, start: Path, data: Path, tmp_path: Path, name: str
) -> None:
    train_stage(STAGES[name], start, data, tmp_path / name)
    one, two = _losses(tmp_path / name), _losses(pair / name)
    assert len(one) == STAGES[name].steps
    torch.testing.assert_close(two, one, rtol=0, atol=LOSS_TOLERANCE)
    alone = tiny_runs.metric_rows(tmp_path / name / "metrics.jsonl")
    together = tiny_runs.metric_rows(pair / name / "metrics.jsonl")
    for key in ("step", "tokens", "images", "skipped", "learning_rate_share"):
        assert [row[key] for row in together] == [row[key] for row in alone]


def test_stages_of_the_test_meet_the_hard_cases(pair: Path) -> None:
    images = [row["images"] for row in tiny_runs.metric_rows(pair / "mixed" / "metrics.jsonl")]
    assert {0, 1, 2} == set(images), "none, one process only, both"
    text = tiny_runs.metric_rows(pair / "text" / "metrics.jsonl")
    assert {row["images"] for row in text} == {0}


def test_killed_pair_goes_on_to_the_same_numbers(
    pair: Path, start: Path, data: Path, tmp_path: Path
) -> None:
    stage, run = loop_processes.KILLED, tmp_path / "killed"
    loop_processes.kill_in_the_middle(2, stage, run, start, data, rows=23)
    found = StateFolders(run).latest()
    assert found is not None and 20 <= found.step < 60
    changed = dataclasses.replace(stage, seed=1)
    with pytest.raises(TrainingStateError, match="run with seed=0"):
        train_stage(changed, start, data, run)
    _go_on_as_torchrun_does(run, start, data)
    whole = pair / "kill"
    old, new = (tiny_runs.metric_rows(folder / "metrics.jsonl") for folder in (whole, run))
    assert new == old
    old_weights, new_weights = (
        load_file(folder / "checkpoint" / "model.safetensors") for folder in (whole, run)
    )
    assert [key for key in old_weights if not torch.equal(old_weights[key], new_weights[key])] == []


def _go_on_as_torchrun_does(run: Path, start: Path, data: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, loop_processes.__file__, *map(str, (run, start, data))]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "PYTHONPATH": path, "RANK": number, "LOCAL_RANK": number},
        )
        for number in ("0", "1")
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]


def test_error_of_a_process_arrives_as_it_was() -> None:
    with pytest.raises(RecipeError, match=r"^the second process does not like its recipe$"):
        run_processes(fail_in_second, 2)


def test_tasks_side_by_side_are_alone_in_their_process(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    run_side_by_side(note_process, [(a, b), (b, a), (c, a)], 2)
    notes = [json.loads((tmp_path / name).read_text()) for name in "abc"]
    assert {note["world_size"] for note in notes} == {1}
    assert {note["threads"] for note in notes} == {1}
    assert os.getpid() not in {note["pid"] for note in notes}
    assert len({note["pid"] for note in notes}) == 2
    with pytest.raises(RecipeError, match=r"^no such task$"):
        run_side_by_side(note_process, [(tmp_path / "d",), (None,)], 2)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_tasks_end_with_the_process_that_was_killed(tmp_path: Path) -> None:
    tasks = [(tmp_path / name, tmp_path / "never") for name in "ab"]
    parent = multiprocessing.get_context("fork").Process(
        target=run_side_by_side, args=(note_process, tasks, 2)
    )
    parent.start()
    _wait_until(lambda: all(note.exists() and note.read_text() for note, _ in tasks))
    parent.kill()
    parent.join()
    for note, _ in tasks:
        stat = Path(f"/proc/{json.loads(note.read_text())['pid']}/stat")
        _wait_until(lambda stat=stat: not stat.exists() or " Z " in stat.read_text())


def _wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until, "in vain"
        time.sleep(0.01)


def test_tasks_of_one_process_run_here(tmp_path: Path) -> None:
    run_side_by_side(note_process, [(tmp_path / name,) for name in "ab"], 1)
    assert {json.loads((tmp_path / n).read_text())["pid"] for n in "ab"} == {os.getpid()}


def test_own_device_deals_out_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local_rank, device in (("0", "cuda:0"), ("1", "cuda:1"), ("2", "cuda:0")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert own_device("cuda") == device
    assert own_device("cpu") == "cpu"
    assert own_device("cuda:1") == "cuda:1"
