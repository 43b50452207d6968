"""The labs: what they share, search and measure, and what may be said of it."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_quickstart import SMALLEST

from mono_internvl.cli.lab import EXPERIMENTS
from mono_internvl.errors import ConfigError
from mono_internvl.miniature import WorldSize, lab_attention
from mono_internvl.miniature import lab_analysis as module
from mono_internvl.miniature.lab_analysis import (
    Claim,
    LabRun,
    Measured,
    read_lab_runs,
    run_lab,
    shortened,
)
from mono_internvl.miniature.lab_experiments import LABS
from mono_internvl.miniature.lab_verdicts import analysis_block, difference, lab_page, verdict
from mono_internvl.miniature.recipes import MINIATURE
from mono_internvl.reports.markdown import NOTHING
from mono_internvl.runs.schemas import METRICS

NUMBERS = [f.name for f in dataclasses.fields(WorldSize) if f.name.startswith(("s1", "s2"))]
TINY = dataclasses.replace(
    SMALLEST,
    size=dataclasses.replace(
        SMALLEST.size,
        **{**dict.fromkeys(NUMBERS, 12), "s2_scenes": 500, "s2_charts": 200},
        **dict.fromkeys(("reading", "open_questions", "copying", "lookups", "english"), 60),
        replay_english=20,
    ),
)
CLAIM = Claim("b is better", "nowhere", {"b": 1, "a": -1}, ("caption", "ocr"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest form of table 9, one seed."""
    folder = tmp_path_factory.mktemp("lab") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QUICK_LAB", TINY)
        patch.setattr(module, "QUICK_STEPS", 2)
        run_lab("table-9", LABS["table-9"], lab_page, folder, seeds=1, quick=True, processes=1)
    return folder


def rows(**scores: list[float]) -> list[LabRun]:
    """Runs of variants, a score for each seed."""
    return [
        LabRun(
            lab="table-9",
            variant=variant,
            title=variant,
            seed=seed,
            quick=False,
            factor=1.0,
            searched={"1": score},
            samples={"s2": 8},
            figures={
                "caption": Measured(score, 100, 0.1, None),
                "ocr": Measured(score, 100),
                "text: perplexity": Measured(10 + score),
            },
            command="c",
            processes=1,
            device="cpu",
            versions={},
            date="2026-01-31",
        )
        for variant, of_seeds in scores.items()
        for seed, score in enumerate(of_seeds)
    ]


def test_help_names_every_lab() -> None:
    assert list(EXPERIMENTS) == list(LABS)


@pytest.mark.parametrize("name", LABS)
def test_labs_compare_variants_that_they_have(name: str) -> None:
    lab = LABS[name]
    variants = lab.variants(shortened(MINIATURE, lab.steps))
    names = {variant.name for variant in variants}
    assert len(names) == len(variants)
    for claim in lab.claims:
        assert set(claim.contrast) <= names
        assert sum(claim.contrast.values()) == 0  # no claim hangs on how high all of them lie
    stages = {stage.name for variant in variants for stage in variant.recipe.stages}
    assert stages == set(lab.steps) and set(lab.between) < stages
    assert 1.0 in lab.factors


def test_stages_that_variants_share_are_trained_once(run: Path) -> None:
    trained = sorted(one.name.split("-")[0] for one in (run / "seed0").iterdir())
    # S1.1 and S1.2 once; S1.3 and S2 for two variants and two factors.
    assert trained == ["s11", "s12", *["s13"] * 4, *["s2"] * 4, "start"]


def test_rows_say_what_was_searched_and_measured(run: Path) -> None:
    found = read_lab_runs(run / module.ROWS)
    assert [one.variant for one in found] == ["frozen", "unfrozen"]
    for one in found:
        assert set(one.searched) == {"0.5", "1"}
        assert one.searched[f"{one.factor:g}"] == max(one.searched.values())
        assert one.samples == dict.fromkeys(("s11", "s12", "s13", "s2"), 2 * 4)
        assert {"caption", "chart", "S1.3: grounding", "text: perplexity"} <= set(one.figures)
        assert "S1.3: chart" not in one.figures
        assert one.figures["colour"].chance is not None and one.figures["colour"].blind is not None
    page = (run / module.PAGE).read_text()
    assert "no verdict with fewer than 3 seeds" in page and "quick run" in page


def test_finished_lab_is_not_run_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("ran again")

    monkeypatch.setattr(module, "QUICK_LAB", TINY)
    monkeypatch.setattr(module, "QUICK_STEPS", 2)
    monkeypatch.setattr(module, "train_stage", fail)
    monkeypatch.setattr(module, "ask", fail)
    before = (run / module.ROWS).read_text()
    run_lab("table-9", LABS["table-9"], lab_page, run, seeds=1, quick=True, processes=1)
    assert (run / module.ROWS).read_text() == before
    with pytest.raises(ConfigError, match="begun with"):
        run_lab("table-5", LABS["table-5"], lab_page, run, seeds=1, quick=True)
    with pytest.raises(ConfigError, match="seeds=0"):
        run_lab("table-9", LABS["table-9"], lab_page, run, seeds=0)


def test_difference_and_interval_by_hand() -> None:
    found = difference(CLAIM, rows(a=[0.5, 0.6, 0.7], b=[0.6, 0.8, 0.8]))
    assert found is not None and found.mean == pytest.approx(0.4 / 3)
    # Differences .1, .2, .1: standard deviation .0577, times 4.303 over the root of 3.
    assert found.half_width == pytest.approx(4.303 * 0.057735 / 3**0.5, rel=1e-3)
    one = difference(CLAIM, rows(a=[0.5], b=[0.6]))
    # Two means of 100 records each, of two kinds: variance of the mean of two is a half of each.
    expected = 1.96 * ((0.25 / 100 + 0.24 / 100) / 2) ** 0.5
    assert one is not None and not one.is_over_seeds
    assert one.half_width == pytest.approx(expected)
    assert difference(CLAIM, rows(a=[0.5])) is None


@pytest.mark.parametrize(
    ("b", "margin", "said"),
    [
        ([0.60, 0.61, 0.62], 0.0, "**shown**"),
        ([0.40, 0.41, 0.42], 0.0, "**contradicted**"),
        ([0.40, 0.60, 0.51], 0.0, "**not shown at this scale**"),
        ([0.495, 0.496, 0.497], 0.0, "**contradicted**"),
        ([0.495, 0.496, 0.497], 0.01, "**shown**"),
        ([0.60, 0.61], 0.0, "no verdict with fewer than 3 seeds; in the claimed direction"),
        ([0.40], 0.0, "no verdict with fewer than 3 seeds; against the claimed direction"),
        ([0.50], 0.0, "no verdict with fewer than 3 seeds; no difference"),
    ],
)
def test_verdict_needs_the_whole_interval(b: list[float], margin: float, said: str) -> None:
    claim = dataclasses.replace(CLAIM, margin=margin)
    assert verdict(claim, difference(claim, rows(a=[0.5] * len(b), b=b))) == said


def test_perplexity_counts_by_its_logarithm() -> None:
    claim = Claim("lower", "nowhere", {"b": -1, "a": 1}, ("text: perplexity",))
    found = difference(claim, rows(a=[10.0], b=[0.0]))
    assert found is not None and found.mean == pytest.approx(0.6931, abs=1e-4)
    assert found.half_width is None


def test_page_of_committed_rows(tmp_path: Path) -> None:
    block = analysis_block("table-9", LABS["table-9"])
    assert block(tmp_path) == NOTHING
    made = rows(frozen=[0.5, 0.5, 0.5], unfrozen=[0.7, 0.7, 0.71])
    file = tmp_path / "analysis.jsonl"
    file.write_text("".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in made))
    page = block(tmp_path)
    assert "not measured" in page and "| caption (100) | 0.500 (0.500, 0.500, 0.500) |" in page
    assert analysis_block("table-5", LABS["table-5"])(tmp_path) == NOTHING
    quick = dataclasses.replace(made[0], quick=True)
    file.write_text(json.dumps(dataclasses.asdict(quick)) + "\n")
    with pytest.raises(ConfigError, match="quick rows"):
        block(tmp_path)
    file.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"analysis.jsonl:1: KeyError"):
        block(tmp_path)


# ------------------------------------------------------------------------------ figure 5


@pytest.fixture
def finished(run: Path, tmp_path: Path) -> Path:
    """A folder that looks like a finished quickstart of an untrained model."""
    (start,) = (run / "seed0").glob("start-*")
    (tmp_path / "model").symlink_to(start / "checkpoint")
    (tmp_path / "data").symlink_to(run / "data" / "seed0")
    (tmp_path / METRICS).touch()
    return tmp_path


def test_figure_5_measures_every_layer(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(seed=0, is_quick=True, command="trained", versions={"commit": "abc"})
    monkeypatch.setattr(lab_attention, "read_metrics", lambda _: made)
    page = lab_attention.look([finished], finished / "out", pictures=2)
    found = read_lab_runs(finished / "out" / module.ROWS)
    assert [one.variant for one in found] == ["even", *(f"layer-{n}" for n in range(1, 7))]
    assert found[0].figures[lab_attention._DISTANCE].value == pytest.approx(1.0)
    assert "trained at commit abc" in found[0].command
    assert set(lab_attention.FIGURE_5.claims[1].contrast) <= {one.variant for one in found}
    assert "no verdict" in page.read_text() and "validation score" not in page.read_text()
    with pytest.raises(ConfigError, match="different seeds"):
        lab_attention.look([finished, finished], finished / "out")
    with pytest.raises(ConfigError, match="let it end"):
        lab_attention.look([finished / "model"], finished / "out")
