"""MPO on the miniature's own errors in its smallest form; its page; what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mono_internvl.cli.app import app
from mono_internvl.errors import ConfigError
from mono_internvl.miniature import lab_mpo
from mono_internvl.miniature.lab_mpo import BEFORE, CHOSEN, PREFERRED, RUNS, mpo_block, mpo_page
from mono_internvl.miniature.lab_pages import Figure
from mono_internvl.miniature.neighbours import (
    MEAN,
    PERPLEXITY,
    NeighbourRun,
    open_grounds,
    read_neighbour_runs,
    verdict,
)
from mono_internvl.miniature.quickstart import SETTINGS


def test_lab_makes_pairs_learns_and_scores(
    monkeypatch: pytest.MonkeyPatch, ground: Path, tmp_path: Path
) -> None:
    sizes = lab_mpo.Sizes(per_kind=3, samples=6, steps=2, heldout=1)
    monkeypatch.setattr(lab_mpo, "QUICK", sizes)
    run = tmp_path / "run"
    words = ["lab", "mpo", str(ground), "--out", str(run), "--quick", "--precision", "fp32"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0 and "MPO against the model after S2" in result.output
    (row,) = read_neighbour_runs(run / RUNS)
    assert set(row.scores) == {BEFORE, PREFERRED, CHOSEN}
    kinds = set(row.scores[BEFORE])
    assert {"colour", "chart", "caption", "ocr", "grounding", "copying", MEAN, PERPLEXITY} <= kinds
    assert row.facts["pairs"] > 0 and row.facts["questions"] == 3 * 10
    asked = [json.loads(s) for s in (run / "seed0" / "data" / "questions.jsonl").open()]
    assert all(one["kind"] != "novel" for one in asked), "novel pairs are never trained on"
    trained = run / "seed0" / PREFERRED / "metrics.jsonl"
    before = trained.stat().st_mtime_ns
    (run / "seed0" / "row.json").unlink()
    again = CliRunner().invoke(app, words, catch_exceptions=False)
    assert again.exit_code == 0 and trained.stat().st_mtime_ns == before, "nothing is done twice"
    (tmp_path / "results").mkdir()
    shutil.copy(run / RUNS, tmp_path / "results")
    with pytest.raises(ConfigError, match="a quick one"):
        mpo_block(tmp_path / "results")


def _runs(*gains: float) -> list[NeighbourRun]:
    return [
        NeighbourRun(
            seed=seed,
            quick=False,
            cpu_minutes=10.0,
            scores={
                BEFORE: {"colour": Figure(0.5, 100), MEAN: Figure(0.5, 100)},
                PREFERRED: {"colour": Figure(0.6, 100), MEAN: Figure(0.5 + gain, 100)},
                CHOSEN: {"colour": Figure(0.5, 100), MEAN: Figure(0.5, 100)},
            },
            facts={
                "questions": 10,
                "right": 60,
                "wrong": 20,
                "pairs": 30,
                "steps": 5,
                "ranked": 0.75,
                "shift": 0.1,
            },
            command="mono-internvl lab mpo",
            processes=1,
            device="cpu",
            versions={"torch": "2"},
            date="2026-01-31",
        )
        for seed, gain in enumerate(gains)
    ]


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ((0.02, 0.03, 0.01), "**shown** (+0.020"),
        ((0.02, 0.03, -0.01), "not shown at this scale"),
        ((0.001, 0.002, 0.001), "not shown at this scale"),
        ((-0.02, -0.03, -0.01), "**contradicted**"),
        ((0.5,), "one seed, which shows nothing"),
    ],
)
def test_verdict_is_plain(gains: tuple[float, ...], said: str) -> None:
    assert said in verdict(_runs(*gains), PREFERRED, BEFORE)


def test_page_shows_each_seed_and_the_gain(tmp_path: Path) -> None:
    runs = _runs(0.02, 0.04)
    page = mpo_page(runs)
    assert "| colour (100) | 0.500 (0.500, 0.500) | 0.600" in page
    assert "+0.030 (+0.020, +0.040)" in page and "25.0%, 25.0% were wrong" in page
    rows = "\n".join(json.dumps(dataclasses.asdict(run)) for run in runs)
    (tmp_path / RUNS).write_text(rows + "\n")
    assert mpo_block(tmp_path) == page + "\n"
    (tmp_path / RUNS).write_text('{"seed": 0}\n')
    with pytest.raises(ConfigError, match=rf"{RUNS}:1: KeyError"):
        mpo_block(tmp_path)


def test_grounds_are_finished_quickstarts_of_different_seeds(ground: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no quickstart"):
        open_grounds([tmp_path])
    with pytest.raises(ConfigError, match="seed 0, as "):
        open_grounds([ground, ground])
    (tmp_path / SETTINGS).write_text('{"seed": 1}')
    with pytest.raises(ConfigError, match="not finished"):
        open_grounds([ground, tmp_path])
