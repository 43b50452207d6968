"""The main job end to end in its smallest form; its figures follow from its files."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest

from mono_internvl.errors import ConfigError
from mono_internvl.miniature import quickstart as module
from mono_internvl.miniature.quickstart import QUICK, quickstart
from mono_internvl.miniature.targets import judge, to_rows

SMALLEST = dataclasses.replace(
    QUICK,
    recipe=dataclasses.replace(
        QUICK.recipe,
        stages=tuple(
            dataclasses.replace(stage, steps=3, batch_size=4) for stage in QUICK.recipe.stages
        ),
    ),
    size=dataclasses.replace(
        QUICK.size,
        heldout=3,
        heldout_aligned=1,
        validation=1,
        text_probes=8,
    ),
    per_kind=2,
    per_kind_between=1,
    per_kind_blind=1,
    text_per_kind=4,
    english_records=4,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QUICK", SMALLEST)
        before = time.process_time()
        quickstart(folder, quick=True, processes=1)
        (folder / "cpu_seconds").write_text(str(time.process_time() - before))
    return folder


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_quickstart_leaves_report_model_and_metrics(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert (run / "report.html").stat().st_size > 10_000
    assert (run / "model" / "model.safetensors").is_file()
    assert [stage["name"] for stage in metrics["stages"]] == ["start", "s11", "s12", "s13", "s2"]
    assert metrics["cpu_minutes"] > 0


def test_cpu_minutes_of_one_process_count_nothing_twice(run: Path) -> None:
    """Alone, the process that trains is the one that rendered and may have done more before."""
    minutes = json.loads((run / "metrics.json").read_text())["cpu_minutes"]
    assert 0 < 60 * minutes <= float((run / "cpu_seconds").read_text())


def test_text_logits_stay_bit_identical_until_attention_learns(run: Path) -> None:
    stages = {s["name"]: s for s in json.loads((run / "metrics.json").read_text())["stages"]}
    same = {name: stage["text_logits_identical"] for name, stage in stages.items()}
    assert same == {"start": True, "s11": True, "s12": True, "s13": False, "s2": False}


def test_targets_follow_from_the_saved_predictions(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    names = [stage["name"] for stage in metrics["stages"]]
    again = judge(
        SMALLEST.bounds,
        {name: read_rows(run / "predictions" / f"{name}.jsonl") for name in names},
        {stage["name"]: stage["text"]["perplexity"] for stage in metrics["stages"]},
        {stage["name"]: stage["text_logits_identical"] for stage in metrics["stages"]},
        metrics["cpu_minutes"],
    )
    assert to_rows(again) == metrics["targets"]


def test_predictions_rescore_to_their_scores(run: Path) -> None:
    from mono_internvl.evaluation.metrics import score

    for row in read_rows(run / "predictions" / "s2.jsonl"):
        assert score(row, row["prediction"]) == row["score"]


def test_second_call_trains_nothing_anew(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUICK", SMALLEST)
    before = (run / "s2" / "metrics.jsonl").stat().st_mtime_ns
    predictions = (run / "predictions" / "s2.jsonl").read_bytes()
    quickstart(run, quick=True, processes=1, ask=False)
    assert (run / "s2" / "metrics.jsonl").stat().st_mtime_ns == before
    assert (run / "predictions" / "s2.jsonl").read_bytes() == predictions


def test_other_settings_in_the_same_folder_are_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"quick=True, expected False"):
        quickstart(run, quick=False)
