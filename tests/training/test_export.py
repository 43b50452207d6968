"""A run in any state of completion becomes a checkpoint that everything here takes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import stored
import tiny_runs
import torch
from interrupted import interrupt
from safetensors.torch import load_file
from typer.testing import CliRunner

from mono_internvl.checkpoints.convert import check_round_trip
from mono_internvl.cli.app import app
from mono_internvl.errors import CheckpointError, ConfigError
from mono_internvl.training.export import export
from mono_internvl.training.loop import train_stage

STAGE = tiny_runs.tiny_stage(steps=6, checkpoint_every=2, keep_last=2)


@pytest.fixture(scope="module")
def run(start: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages: the first is finished, the second was stopped after step 5."""
    root = tmp_path_factory.mktemp("runs") / "mine"
    train_stage(STAGE, start, data, root / "first")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 5, STAGE, start, data, root / "second")
    os.utime(root / "first/checkpoint/training_state.json", (1, 1))
    return root


def test_state_is_exported_as_the_stage_would_be(run: Path, tmp_path: Path) -> None:
    made = export(run, tmp_path / "out")
    assert (made.source, made.step, made.of) == (run / "second/step_00000004", 4, 6)
    whole, part = (
        load_file(folder / "model.safetensors")
        for folder in (run / "first/checkpoint", tmp_path / "out")
    )
    assert whole.keys() == part.keys()
    stored_name = "model.lm_head.weight"
    state = load_file(stored.shard(made.source))
    assert torch.equal(part["language_model.output.weight"], state[stored_name])
    assert not check_round_trip(tmp_path / "out").differences


def test_step_stage_and_dtype_can_be_chosen(run: Path, tmp_path: Path) -> None:
    earlier = export(run / "second", tmp_path / "a", step=2, dtype="bfloat16")
    assert (earlier.step, earlier.source.name) == (2, "step_00000002")
    assert {x.dtype for x in load_file(tmp_path / "a/model.safetensors").values()} == {
        torch.bfloat16
    }
    finished = export(run / "first", tmp_path / "b")
    assert (finished.step, finished.source.name) == (6, "checkpoint")
    state = export(run / "second/step_00000002", tmp_path / "c")
    assert state.step == 2


def test_what_cannot_be_exported_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no state of step 3; there are those of 2, 4"):
        export(run / "second", tmp_path / "out", step=3)
    with pytest.raises(CheckpointError, match="neither a finished stage nor a saved state"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is there already"):
        export(run, tmp_path)
    with pytest.raises(ConfigError, match="dtype='int4'"):
        export(run, tmp_path / "out", dtype="int4")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_command_says_what_it_took(run: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["export", str(run), "--out", str(tmp_path / "out")])
    assert said.exit_code == 0, said.output
    assert "tiny after 4 of 6 steps" in said.output


def test_state_of_the_earlier_layout_is_exported(run: Path, tmp_path: Path) -> None:
    state = Path(shutil.copytree(run / "second/step_00000002", tmp_path / "step_00000002"))
    expected = export(state, tmp_path / "a")
    stored.as_written_before(state)
    assert export(state, tmp_path / "b").step == expected.step
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
