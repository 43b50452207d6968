"""What is said before and during a long run follows from timed steps."""

import dataclasses
from pathlib import Path

import pytest
import tiny_runs

from mono_internvl.compute import make_plan
from mono_internvl.miniature.targets import FULL_BOUNDS, QUICK_BOUNDS, bounds_in
from mono_internvl.training import estimate as module
from mono_internvl.training.estimate import Estimate, estimate, in_minutes
from mono_internvl.training.loop import StepTime, time_steps
from mono_internvl.training.progress import StageProgress


def test_steps_are_timed_and_nothing_is_kept(tmp_path: Path) -> None:
    start = tiny_runs.write_checkpoint(tmp_path / "start")
    data = tiny_runs.write_data(tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    found = time_steps(tiny_runs.tiny_stage(), start, data, make_plan("cpu", "fp32"), steps=2)
    assert 0 < found.cpu_s < 60 and 0 < found.wall_s < 60
    assert sorted(tmp_path.rglob("*")) == before


def test_estimate_is_steps_times_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def timed(stage: tiny_runs.Stage, *rest: object) -> StepTime:
        sizes.append(stage.batch_size)
        return StepTime(cpu_s=0.3, wall_s=0.6)

    monkeypatch.setattr(module, "time_steps", timed)
    stage = tiny_runs.tiny_stage(steps=1000, batch_size=8)
    stages = [stage, dataclasses.replace(stage, name="next", steps=500)]
    found = estimate(stages, Path("x"), Path("x"), make_plan("cpu", "fp32", processes=2))
    assert sizes == [4, 4], "one process takes its part of the batch"
    assert dict(found.seconds) == pytest.approx({"tiny": 660, "next": 330})
    assert found.cpu_minutes == pytest.approx(2 * 1.1 * 1500 * 0.3 / 60)
    assert found.describe().startswith("estimate: about 16 minutes, 16.5 CPU minutes")


def test_what_is_left_is_corrected_by_what_was_done() -> None:
    found = Estimate({"a": 100.0, "b": 200.0, "c": 300.0}, 1.0)
    assert found.seconds_left([], 0.0) == 600
    assert found.seconds_left(["a"], 150.0) == 750
    assert found.seconds_left(["a", "b"], 150.0) == 150
    assert found.seconds_left(["finished long ago"], 5.0) == 600
    assert (in_minutes(0.2), in_minutes(61), in_minutes(150)) == (
        "about 10 seconds",
        "about 60 seconds",
        "about 2 minutes",
    )


def test_progress_on_a_pipe_says_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"loss": 1.0, "tokens": 10, "images": 1, "skipped": 0}
    with StageProgress(tiny_runs.tiny_stage(steps=20), first_step=8) as progress:
        progress.began -= 60
        progress.update({**row, "step": 10})
        progress.update({**row, "step": 20})
    lines = capsys.readouterr().err.splitlines()
    assert "tiny 10/20" in lines[0] and lines[0].endswith("0:05:00 left")
    assert "tiny 20/20" in lines[1] and "left" not in lines[1]


def test_bound_of_the_time_goes_by_precision() -> None:
    minutes = {name: bounds_in(name, FULL_BOUNDS)["CPU minutes"].must for name in ("bf16", "fp32")}
    assert minutes == {"bf16": 20, "fp32": 40}
    for bounds in (FULL_BOUNDS, QUICK_BOUNDS):
        others = {k: v for k, v in bounds_in("fp32", bounds).items() if k != "CPU minutes"}
        assert others == {k: v for k, v in bounds.items() if k != "CPU minutes"}
    assert bounds_in("fp32", {}) == {}
