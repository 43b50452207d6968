"""A run folder keeps to what it was begun with, and its files are whole or not there."""

import json
from pathlib import Path

import pytest

from mono_internvl.errors import ConfigError, TrainingStateError
from mono_internvl.runs.folder import begin, check_settings, exclusive, write_whole


def test_a_run_folder_keeps_to_its_settings(tmp_path: Path) -> None:
    file = tmp_path / "lab.json"
    begin(file, {"quick": True, "seed": 0})
    begin(file, {"quick": True, "seed": 0})
    before = file.read_text()
    with pytest.raises(ConfigError, match=r"begun with seed=0, expected 1; .*--out"):
        begin(file, {"quick": True, "seed": 1})
    assert file.read_text() == before
    check_settings(file, {"seed": 0}, "never said")


@pytest.mark.parametrize("found", [None, "", "{", "[1]", "3"])
def test_settings_that_cannot_be_read_are_refused(tmp_path: Path, found: str | None) -> None:
    file = tmp_path / "lab.json"
    if found is not None:
        file.write_text(found)
    with pytest.raises(ConfigError, match=r"lab\.json: not readable .*; do this"):
        check_settings(file, {}, "do this")


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    for run in (tmp_path / "run", tmp_path / "run" / "below"):
        with (
            pytest.raises(TrainingStateError, match=r"run.*: not a folder .*another output"),
            exclusive(run),
        ):
            pytest.fail("held")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.json"
    write_whole(file, json.dumps({"name": "Ä"}))
    assert file.read_bytes() == b'{"name": "\\u00c4"}\n'
    write_whole(file, "ended\n")
    assert file.read_text() == "ended\n"

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(file, "half")
    assert file.read_text() == "ended\n"
