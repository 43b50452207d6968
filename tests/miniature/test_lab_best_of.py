"""A critic against a vote in its smallest form; the tasks in steps; the page."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mono_internvl.cli.app import app
from mono_internvl.errors import ConfigError
from mono_internvl.evaluation.answer_formats import FORMATS
from mono_internvl.evaluation.critic import split_steps
from mono_internvl.miniature import lab_best_of
from mono_internvl.miniature.lab_best_of import COUNTS, RUNS, best_of_block
from mono_internvl.miniature.neighbours import MEAN, read_neighbour_runs
from mono_internvl.miniature.step_tasks import STEP_KINDS, step_records


def test_steps_lead_to_their_result(tmp_path: Path) -> None:
    records = step_records(tmp_path, "some", "train", 30, seed=0)
    assert {record["kind"] for record in records} == set(STEP_KINDS)
    for record in records:
        text = record["conversations"][1]["value"]  # type: ignore[index]
        first, second, sum_, last = split_steps(text)
        one, two = (int(step.rpartition(" ")[2]) for step in (first, second))
        result = one + two if record["kind"] == "adding" else abs(one - two)
        assert record["answer"] == str(result) == FORMATS["marked"].extract(last)
        left, operator, right = re.match(r"(\d) ([+-]) (\d) = ", sum_).groups()  # type: ignore[union-attr]
        assert {int(left), int(right)} == {one, two}
        assert operator == ("+" if record["kind"] == "adding" else "-")
        assert (tmp_path / str(record["image"])).is_file()
    sums = {r["answer"] for r in records if r["kind"] == "adding"}
    assert sums == {"1", "2", "3"}


def test_lab_trains_a_critic_and_chooses(
    monkeypatch: pytest.MonkeyPatch, ground: Path, tmp_path: Path
) -> None:
    sizes = lab_best_of.Sizes(
        train=4, policy_steps=1, judged=1, continuations=1, critic_steps=1, heldout=1
    )
    monkeypatch.setattr(lab_best_of, "QUICK", sizes)
    monkeypatch.setattr(lab_best_of, "PROTOCOL", lab_best_of.PROTOCOL.of_length(12))
    run = tmp_path / "run"
    words = ["lab", "best-of", str(ground), "--out", str(run), "--quick", "--precision", "fp32"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0 and "the critic against the vote" in result.output
    (row,) = read_neighbour_runs(run / RUNS)
    for count in COUNTS:
        for way in ("greedy", "random", "vote", "critic", "any"):
            assert set(row.scores[f"{way}@{count}"]) == {*STEP_KINDS, MEAN}
    assert len({str(row.scores[f"{way}@1"]) for way in ("greedy", "vote", "critic", "any")}) == 1
    (tmp_path / "results").mkdir()
    shutil.copy(run / RUNS, tmp_path / "results")
    with pytest.raises(ConfigError, match="a quick one"):
        best_of_block(tmp_path / "results")
