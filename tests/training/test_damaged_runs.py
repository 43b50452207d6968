"""Runs whose folder or data was changed between two calls: refused by name, or gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stored
import tiny_runs

from mono_internvl.data.sources import JsonlSource
from mono_internvl.errors import CheckpointError, TrainingStateError
from mono_internvl.runs.folder import exclusive, new_folder, resumable
from mono_internvl.training import loop
from mono_internvl.training.loop import train_stage
from mono_internvl.training.state import digest_of_data

STAGE = tiny_runs.tiny_stage(steps=6, checkpoint_every=4)


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def stopped(start: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 5, with the state of step 4."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    step = loop._Loop._step

    def stop(self: Any, number: int, *arguments: Any) -> Any:
        if number == 5:
            raise Stopped
        return step(self, number, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, "_step", stop)
        with pytest.raises(Stopped):
            train_stage(STAGE, start, data, run)
    return run


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def _set_step(run: Path, step: int) -> None:
    file = run / "step_00000004" / "training_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "step": step}))


def _lose_tokenizer(run: Path) -> None:
    for file in (run / "step_00000004").glob("tokenizer*"):
        file.unlink()


def _as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda run: _set_step(run, -4), "step -4"),
    (lambda run: _set_step(run, 9), "after 9 steps of a stage of 6"),
    (lambda run: _as_folder(run / "metrics.jsonl"), "metrics.jsonl: no rows"),
    (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n"), "metrics.jsonl: no rows"),
    (lambda run: (run / "metrics.jsonl").write_text("[1]\n"), "metrics.jsonl: no rows"),
    (lambda run: (run / "metrics.jsonl").write_text('{"a": 1}\n'), "metrics.jsonl: no rows"),
    (lambda run: (run / "step_00000008").touch(), "step_00000008: is no folder"),
    (_lose_tokenizer, r"step_00000004: tokenizer\.json is missing"),
    (lambda run: (run / "checkpoint").touch(), "checkpoint: no readable training_state"),
]


@pytest.mark.parametrize(("damage", "complaint"), DAMAGES)
def test_damaged_run_is_refused_by_name(
    start: Path, data: Path, run: Path, damage: Callable[[Path], object], complaint: str
) -> None:
    damage(run)
    with pytest.raises((TrainingStateError, CheckpointError), match=complaint):
        train_stage(STAGE, start, data, run)


def test_run_goes_on_beside_a_users_copy_of_a_state(start: Path, data: Path, run: Path) -> None:
    copy = shutil.copytree(run / "step_00000004", run / "step_00000004_backup")
    assert train_stage(STAGE, start, data, run).resumed_at == 4
    assert stored.shard(copy).is_file()
    assert not (run / "step_00000004").exists()


def test_state_has_nothing_that_engines_would_take_for_weights(run: Path) -> None:
    """They read every safetensors file beside config.json as weights of the model."""
    assert not list((run / "step_00000004").glob("*.safetensors"))
    assert stored.shard(run / "step_00000004").parent.name == "shards"


def test_state_is_not_pickled(run: Path) -> None:
    files = {path.suffix for path in (run / "step_00000004").rglob("*") if path.is_file()}
    assert files <= {".json", ".jinja", ".safetensors", ".model", ".txt"}


@pytest.mark.parametrize("name", ["optimizer.state", "optimizer.safetensors"])
def test_run_goes_on_from_an_optimizer_under_its_earlier_names(
    start: Path, data: Path, run: Path, name: str
) -> None:
    stored.as_written_before(run / "step_00000004", name)
    assert train_stage(STAGE, start, data, run).resumed_at == 4


def test_changed_records_of_the_same_size_are_noticed(
    start: Path, data: Path, run: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(data, tmp_path / "data"))
    file = other / "text.jsonl"
    changed = file.read_bytes().replace(b"say one", b"say two")
    assert len(changed) == file.stat().st_size and changed != file.read_bytes()
    file.write_bytes(changed)
    with pytest.raises(TrainingStateError, match="begun with another data content"):
        train_stage(STAGE, start, other, run)


def test_digest_of_two_million_records_is_cheap(tmp_path: Path) -> None:
    """242 MB take a quarter second of a 2 GHz core; a bound with headroom for a busy machine."""
    meta, annotation = tmp_path / "meta.json", tmp_path / "a.jsonl"
    meta.touch()
    with annotation.open("wb") as file:
        file.truncate(242_000_000)
    source = JsonlSource(annotation, tmp_path)
    began = time.process_time()
    digest_of_data(meta, [source])
    assert time.process_time() - began < 4


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps")
def test_resumed_run_lets_go_of_the_files_of_its_state(
    monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, run: Path
) -> None:
    maps: list[str] = []
    step = loop._Loop._step

    def look(self: Any, *arguments: Any) -> Any:
        maps.append(Path("/proc/self/maps").read_text())
        return step(self, *arguments)

    monkeypatch.setattr(loop._Loop, "_step", look)
    assert train_stage(STAGE, start, data, run).resumed_at == 4
    assert len(maps) == 2
    assert not any("step_00000004" in text for text in maps)


def test_folder_that_cannot_be_held_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for run in (tmp_path / "file" / "run", tmp_path / ("n" * 300), Path("/proc/x")):
        with pytest.raises(TrainingStateError, match="not a folder to write to"), exclusive(run):
            pass


def test_two_new_folders_of_one_name_do_not_meet(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="not written"), new_folder(out) as second:
        with new_folder(out) as first:
            (first / "a").touch()
            (second / "b").touch()
        assert [path.name for path in out.iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_interrupt_says_that_the_run_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)  # other libraries' tests may have set one
    with pytest.raises(KeyboardInterrupt), resumable(tmp_path):
        raise KeyboardInterrupt
    assert f"the same command goes on from what {tmp_path} holds" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without a signal")
def test_termination_says_that_the_run_goes_on(tmp_path: Path) -> None:
    code = (
        "import time; from pathlib import Path\n"
        "from mono_internvl.runs.folder import resumable\n"
        f"with resumable(Path({str(tmp_path)!r})): print('ready', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert b"the same command goes on" in process.stderr.read()
        assert process.wait(30) == -signal.SIGTERM
