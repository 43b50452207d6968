"""A run keeps the precision it began with, and its folder and figures say what computed them."""

import json
from pathlib import Path

import pytest
import tiny_runs

from mono_internvl import compute
from mono_internvl.compute import make_plan
from mono_internvl.errors import ConfigError
from mono_internvl.runs.provenance import origin, place_of
from mono_internvl.training.recipe import Recipe
from mono_internvl.training.run import train
from mono_internvl.training.state import PLAN_FILE, keep_plan, read_state


def _bf16_costs(monkeypatch: pytest.MonkeyPatch, cost: float) -> None:
    monkeypatch.setattr(compute, "bf16_cost", lambda device_type: cost)


def _recipe(**fields: object) -> Recipe:
    """A recipe of two stages of two steps."""
    said = {"steps": 2, "precision": "auto", "checkpoint_every": 1, **fields}
    stages = tuple(tiny_runs.tiny_stage(name=name, **said) for name in ("first", "second"))
    return Recipe(name="two", source="a test", stages=stages)


def _precisions(run: Path) -> list[str]:
    folders = [run / name / "checkpoint" for name in ("first", "second")]
    return [read_state(folder).stage["precision"] for folder in folders]


def test_train_keeps_its_precision_over_all_stages(
    monkeypatch: pytest.MonkeyPatch,
    start: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {"start": str(start), "data": data, "run": tmp_path / "run", "processes": 1}
    recipe = _recipe()
    _bf16_costs(monkeypatch, 0.3)
    train(recipe, **options)
    assert "plan: cpu, bf16 (bf16 products 3.3x faster), attention blocked" in (
        capsys.readouterr().out
    )
    assert json.loads((tmp_path / "run" / PLAN_FILE).read_text())["precision"] == "bf16"
    # Go on on another machine, where the second stage is still to come.
    second = tmp_path / "run" / "second"
    for file in sorted(second.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    _bf16_costs(monkeypatch, 40.0)
    train(recipe, **options)
    assert _precisions(tmp_path / "run") == ["bf16", "bf16"]
    with pytest.raises(ConfigError, match="begun with precision='bf16', asked for 'fp32'"):
        train(recipe, **options, precision="fp32")


def test_train_computes_in_the_precision_asked_for(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    _bf16_costs(monkeypatch, 0.3)
    options = {"start": str(start), "data": data, "processes": 1}
    train(_recipe(), run=tmp_path / "flag", precision="fp32", **options)
    train(_recipe(precision="fp32"), run=tmp_path / "recipe", **options)
    for name in ("flag", "recipe"):
        assert _precisions(tmp_path / name) == ["fp32", "fp32"]
        assert json.loads((tmp_path / name / PLAN_FILE).read_text())["precision"] == "fp32"


def test_run_begun_before_plans_keeps_its_precision(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = {"start": str(start), "data": data, "run": run, "processes": 1}
    train(_recipe(), **options, precision="bf16")
    (run / PLAN_FILE).unlink()
    _bf16_costs(monkeypatch, 40.0)
    plan = keep_plan(run, make_plan("cpu"), "auto")
    assert (plan.precision, plan.attention) == ("bf16", "blocked")
    assert plan.reason == "as the run began"


def test_damaged_plan_is_named(tmp_path: Path) -> None:
    (tmp_path / PLAN_FILE).write_text("{")
    with pytest.raises(ConfigError, match=rf"{PLAN_FILE}: not a plan"):
        keep_plan(tmp_path, make_plan("cpu"), "auto")


def test_training_processes_fit_cores_batch_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "cores", lambda: 64)
    monkeypatch.setattr(compute, "available_bytes", lambda: 100)
    assert make_plan("cpu", "fp32", batch_size=128, process_bytes=1).processes == 64
    assert make_plan("cpu", "fp32", batch_size=128, process_bytes=30).processes == 2
    assert make_plan("cpu", "fp32", batch_size=128, process_bytes=3000).processes == 1


def test_figures_say_what_computed_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _bf16_costs(monkeypatch, 40.0)
    made = origin(make_plan("cpu", processes=2))
    assert (made["processes"], made["device"]) == (2, "cpu")
    assert made["plan"]["precision"] == "fp32" and made["plan"]["bf16_cost"] == 40
    capability = compute.cpu_capability()
    assert made["plan"]["cpu_capability"] == capability
    threads = made["plan"]["threads"]
    many = "s" if threads != 1 else ""
    assert place_of(made) == f"cpu ({capability}), fp32, {threads} thread{many} each"
    assert place_of({**made, "plan": None}) == "cpu", "figures older than plans"
