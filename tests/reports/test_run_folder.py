"""What a run left is read completely or refused with the place of the fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mono_internvl.errors import MonoInternVLError, SampleError, TrainingStateError
from mono_internvl.runs.predictions import read_answers
from mono_internvl.runs.schemas import StageResult, Target, Threshold, read_losses, read_metrics


def test_read_metrics_reads_every_part(run: Path) -> None:
    metrics = read_metrics(run)
    assert [stage.label for stage in metrics.stages] == ["start", "S1.1", "S1.2", "S1.3", "S2"]
    assert metrics.stages[1].scores["colour"].blind == 0.25
    assert metrics.stages[1].is_text_identical is True
    assert metrics.stages[0].is_text_identical is None
    assert metrics.versions["commit"] == "0123abcd"
    assert metrics.targets[1] == Target("text perplexity", 1.25, 1.1, 1.05, True, False)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "not found"),
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"targets": 1}', "targets"),
        ('{"stages": [[]]}', r"stages\[0\]"),
        ('{"stages": [{"scores": {"ocr": 1}}]}', r"scores\.ocr"),
    ],
)
def test_read_metrics_refuses_other_forms(tmp_path: Path, content: str | None, named: str) -> None:
    if content is not None:
        (tmp_path / "metrics.json").write_text(content, encoding="utf-8")
    with pytest.raises(TrainingStateError, match=named) as caught:
        read_metrics(tmp_path)
    assert isinstance(caught.value, MonoInternVLError)


@pytest.mark.parametrize(
    ("aim", "value", "higher", "reaches"),
    [
        (0.9, 0.9, True, True),
        (0.9, 0.89, True, False),
        (1.1, 1.2, False, False),
        (1.1, 1.0, False, True),
        (True, True, True, True),
        (True, False, True, False),
        (None, 0.5, True, False),
        (0.5, None, True, False),
    ],
)
def test_target_reaches_its_aim_in_its_direction(
    aim: Threshold, value: Threshold, higher: bool, reaches: bool
) -> None:
    assert Target("x", None, aim, value, True, higher).reaches_aim is reaches


@pytest.mark.parametrize(("name", "label"), [("s11", "S1.1"), ("s2", "S2"), ("sft", "sft")])
def test_stage_is_labelled_as_in_the_paper(name: str, label: str) -> None:
    assert StageResult(name, "", "", None, None, None, {}, {}, None).label == label


def test_read_losses_counts_a_repeated_step_once(tmp_path: Path) -> None:
    path = tmp_path / "s11" / "metrics.jsonl"
    path.parent.mkdir()
    rows = [(1, 3.0), (2, 9.0), (2, 2.0), (3, float("nan")), (4, 1.0)]
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in rows]
    path.write_text("\n".join([*lines, '{"step": 5, "lo']), encoding="utf-8")
    assert read_losses(tmp_path, "s11") == [3.0, 2.0, 1.0]
    assert read_losses(tmp_path, "s12") == []


def test_read_losses_names_the_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "s11" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1, "loss": 1}\nbroken\n{}\n', encoding="utf-8")
    with pytest.raises(SampleError, match=r"metrics\.jsonl:2: not JSON"):
        read_losses(tmp_path, "s11")


def test_read_answers_leaves_out_blind_and_text_rows(run: Path) -> None:
    answers = read_answers(run, "s2")
    assert len(answers) == 40
    assert {answer.kind for answer in answers} == {"caption", "colour", "grounding", "ocr"}
    assert all(answer.text != "a blind guess" for answer in answers)
