"""The main job end to end in its smallest form; its figures follow from its files."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from mono_internvl.errors import ConfigError
from mono_internvl.miniature import quickstart as module
from mono_internvl.miniature.quickstart import QUICK, quickstart
from mono_internvl.miniature.scoring import BENCHMARK, PROTOCOL
from mono_internvl.miniature.targets import judge
from mono_internvl.runs.predictions import read_predictions
from mono_internvl.runs.schemas import TextMeasures, read_metrics

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
    metrics = read_metrics(run)
    names = [stage.name for stage in metrics.stages]
    again = judge(
        SMALLEST.bounds,
        {name: read_predictions(run / "predictions" / f"{name}.jsonl") for name in names},
        {name: TextMeasures.read(run / name / "text.json") for name in names},
        metrics.cpu_minutes or 0,
    )
    assert again == metrics.targets


def test_metrics_are_written_as_they_are_read(run: Path, tmp_path: Path) -> None:
    metrics = read_metrics(run)
    metrics.write(tmp_path)
    assert read_metrics(tmp_path) == metrics


def test_predictions_rescore_and_say_how_they_were_asked(run: Path) -> None:
    found = read_predictions(run / "predictions" / "s2.jsonl")
    assert [BENCHMARK.score(one.record, one.text) for one in found] == [a.score for a in found]
    plan = json.loads((run / "metrics.json").read_text())["plan"]
    asked = dataclasses.replace(
        PROTOCOL, precision=plan["precision"], attention=plan["attention"]
    ).to_dict()
    assert all(one.protocol == asked for one in found)
    assert read_metrics(run).protocol == asked


@pytest.mark.parametrize("change", [{"max_new_tokens": 96}, None])
def test_answers_of_another_protocol_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any] | None
) -> None:
    monkeypatch.setattr(module, "QUICK", SMALLEST)
    other = tmp_path / "run"
    shutil.copytree(run, other)
    file = other / "predictions" / "s12.jsonl"
    rows = read_rows(file)
    for row in rows:
        row["protocol"] = change and {**row["protocol"], **change}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=r"s12\.jsonl: .*delete .*s12/text\.json to ask anew"):
        quickstart(other, quick=True, processes=1, ask=False)
    (other / "s12" / "text.json").unlink()
    quickstart(other, quick=True, processes=1, ask=False)
    assert file.read_text() == (run / "predictions" / "s12.jsonl").read_text()


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
