"""The quickstart over seeds and rates: what is run, what is kept, what the pages say of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_quickstart import SMALLEST

from mono_internvl.errors import ConfigError
from mono_internvl.miniature import lab_rates, lab_seeds
from mono_internvl.miniature.lab_rates import compare_rates, rates_block, scaled
from mono_internvl.miniature.lab_seeds import compare_seeds, read_seed_runs, seeds_block
from mono_internvl.miniature.recipes import MINIATURE, seeded

MADE_BY = {
    "command": "mono-internvl lab seeds",
    "device": "cpu",
    "processes": 1,
    "versions": {"torch": "2.13.0", "commit": "0123456789ab"},
    "date": "2026-01-31",
}


def target(value: float, must: float = 0.4) -> dict[str, Any]:
    """A target as `metrics.json` has it."""
    return {
        "name": "naming of unseen pairs",
        "must": must,
        "aim": None,
        "value": value,
        "met": value >= must,
        "better": "higher",
    }


def seed_row(seed: int, value: float, precision: str = "bf16") -> str:
    said = {"seed": seed, "precision": precision, "instructions": "AVX512", "scores": {}}
    return json.dumps({**MADE_BY, **said, "targets": [target(value)]})


def test_seeded_changes_the_order_of_every_stage_and_nothing_else() -> None:
    other = seeded(MINIATURE, 2)
    assert {stage.seed for stage in other.stages} == {2}
    assert seeded(other, 0) == MINIATURE


def test_scaled_multiplies_rates_and_keeps_what_is_frozen() -> None:
    for stage, twice in zip(MINIATURE.stages, scaled(MINIATURE, 2.0).stages, strict=True):
        for rule, other in zip(stage.rules, twice.rules, strict=True):
            rate = rule.learning_rate
            assert other.learning_rate == (None if rate is None else 2 * rate)


def test_seeds_block_shows_mean_and_each_and_marks_what_is_missed(tmp_path: Path) -> None:
    rows = [seed_row(1, 0.3), seed_row(0, 0.6), seed_row(0, 0.5, "fp32")]
    (tmp_path / lab_seeds.RUNS).write_text("\n".join(rows) + "\n")
    said = seeds_block(tmp_path)
    assert "bf16 on AVX512: mean (0, 1)" in said
    assert "| naming of unseen pairs | \u2265 0.4 | 0.45 (0.6, **0.3**) | 0.5 (0.5) |" in said
    assert "commit 0123456789ab" in said


def test_seeds_block_refuses_two_protocols_in_one_column(tmp_path: Path) -> None:
    other = json.loads(seed_row(0, 0.6)) | {"protocol": {"max_new_tokens": 64}}
    (tmp_path / lab_seeds.RUNS).write_text(f"{seed_row(1, 0.3)}\n{json.dumps(other)}\n")
    with pytest.raises(ConfigError, match="measure them again under one protocol"):
        seeds_block(tmp_path)


def test_fields_that_say_nothing_make_no_other_protocol(tmp_path: Path) -> None:
    older, newer = (
        json.dumps(json.loads(seed_row(seed, 0.5)) | {"protocol": {"max_tiles": 1, **more}})
        for seed, more in ((0, {}), (1, {"frames": None}))
    )
    (tmp_path / lab_seeds.RUNS).write_text(f"{older}\n{newer}\n")
    assert "mean (0, 1)" in seeds_block(tmp_path)


def test_read_seed_runs_refuses_other_rows(tmp_path: Path) -> None:
    assert read_seed_runs(tmp_path / "absent.jsonl") == []
    (tmp_path / "rows.jsonl").write_text('{"seed": 1}\n')
    with pytest.raises(ConfigError, match="lab seeds"):
        read_seed_runs(tmp_path / "rows.jsonl")


def test_compare_seeds_runs_each_once_and_adds_to_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def made_up(folder: Path, *, seed: int, precision: str, processes: int, ask: bool) -> None:
        assert processes == 1 and not ask
        ran.append(seed)
        folder.mkdir(parents=True)
        stages = [{"scores": {"colour": {"score": 0.75}}}]
        plan = {"precision": precision, "cpu_capability": "AVX2"}
        metrics = {"seed": seed, "plan": plan, "stages": stages}
        (folder / "metrics.json").write_text(
            json.dumps({**MADE_BY, **metrics, "targets": [target(0.5)]})
        )

    monkeypatch.setattr(lab_seeds, "quickstart", made_up)
    compare_seeds(tmp_path / "run", seeds=(0, 1), precision="fp32")
    rows = read_seed_runs(compare_seeds(tmp_path / "run", seeds=(0, 2), precision="fp32"))
    assert ran == [0, 1, 2]
    assert [(row.seed, row.precision, row.instructions, row.scores) for row in rows] == [
        (seed, "fp32", "AVX2", {"colour": 0.75}) for seed in (0, 1, 2)
    ]


def test_compare_rates_scores_every_factor_on_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab_rates, "QUICK", SMALLEST)
    file = compare_rates(tmp_path / "run", factors=(0.5, 2.0), quick=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["factor"] for row in rows] == [0.5, 2.0]
    kinds = {json.loads(line)["kind"] for line in (tmp_path / "run/data/validation.jsonl").open()}
    assert all(set(row["scores"]) == kinds for row in rows)
    (tmp_path / lab_rates.RATES).write_text(file.read_text())
    block = rates_block(tmp_path)
    assert "| validation split | rates x 0.5 | rates x 2 |" in block
    assert "sizes of `--quick`" in block
