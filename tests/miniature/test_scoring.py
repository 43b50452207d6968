"""Captions scored by hand; the miniature's kinds, each by its metric."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mono_internvl
from mono_internvl.errors import SampleError
from mono_internvl.evaluation.metrics.metric import METRICS
from mono_internvl.miniature.scoring import BENCHMARK, caption_attributes

CIRCLE = ["large", "red", "circle", "top left"]
STAR = ["small", "blue", "star", "bottom"]
CIRCLE_TEXT = "a large red circle at the top left"
STAR_TEXT = "a small blue star at the bottom"


@pytest.mark.parametrize(
    ("prediction", "truth", "correct", "total"),
    [
        ("a large red circle at the top left.", [CIRCLE], 4, 4),
        (
            "a large red circle at the top left and a small blue star at the bottom.",
            [CIRCLE, STAR],
            8,
            8,
        ),
        (
            "a small blue star at the bottom and a large red circle at the top left.",
            [CIRCLE, STAR],
            8,
            8,
        ),
        ("a small red circle at the top left.", [CIRCLE], 3, 4),
        ("a small green star at the top.", [CIRCLE], 0, 4),
        ("a large red circle at the top left.", [CIRCLE, STAR], 4, 8),
        (f"{CIRCLE_TEXT} and {STAR_TEXT}.", [CIRCLE], 3, 4),
        ("red circle", [CIRCLE], 2, 4),
        ("large red circle, blue star at the bottom", [CIRCLE, STAR], 6, 8),
        ("circle", [CIRCLE], 1, 4),
        ("a large circle at the top left", [CIRCLE], 3, 4),
        ("a huge red circle at the top left", [CIRCLE], 3, 4),
        ("", [CIRCLE], 0, 4),
        ("one two three four five six", [CIRCLE], 0, 4),
        (
            "a large red circle at the top left and " * 3 + "nothing more to say here",
            [CIRCLE],
            1,
            4,
        ),
    ],
)
def test_caption_attributes_hand_computed(
    prediction: str, truth: list[list[str]], correct: int, total: int
) -> None:
    count = caption_attributes(prediction, truth)
    assert (count.correct, count.total) == (correct, total)


def test_caption_attributes_uses_best_matching_not_order() -> None:
    # matched in order: 1 (size) + 1 (size) right; the other way round: 3 + 3
    said = "a large blue star at the bottom and a small red circle at the top left"
    truth = [["large", "red", "circle", "top left"], ["small", "blue", "star", "bottom"]]
    assert caption_attributes(said, truth).correct == 6


def test_caption_score_is_floored_at_zero() -> None:
    said = " and ".join(["a small green cross at the right"] * 9)
    assert caption_attributes(said, [CIRCLE]).correct == -8
    assert BENCHMARK.score({"kind": "caption", "attributes": [CIRCLE]}, said) == 0.0


@pytest.mark.parametrize(
    ("record", "prediction", "expected"),
    [
        ({"kind": "colour", "answer": "red"}, "Red", 1.0),
        ({"kind": "novel", "answer": "red star"}, "red circle", 0.0),
        ({"kind": "ocr", "answer": "AB"}, "AC", 0.5),
        ({"kind": "grounding", "answer": "", "box": [0, 0, 10, 10]}, "[[0, 0, 10, 5]]", 0.5),
        ({"kind": "caption", "answer": "", "attributes": [CIRCLE]}, "a large red star.", 0.5),
    ],
)
def test_score_goes_by_kind(record: dict[str, object], prediction: str, expected: float) -> None:
    assert BENCHMARK.score(record, prediction) == expected


@pytest.mark.parametrize(
    "attributes",
    [[], ["red"], [["large", "red", "circle"]], [["large", "red", "circle", 7]], "a red circle"],
)
def test_score_refuses_malformed_attributes(attributes: object) -> None:
    with pytest.raises(SampleError, match=r"r7: `attributes` is .*correct the record"):
        BENCHMARK.score({"id": "r7", "kind": "caption", "attributes": attributes}, "a red star")


def test_score_refuses_an_unknown_kind() -> None:
    with pytest.raises(SampleError, match="kind='colors' is no metric of benchmark 'miniature'"):
        BENCHMARK.score({"kind": "colors", "answer": "red"}, "red")


@pytest.mark.parametrize("room", ["evaluation", "reports", "runs"])
def test_generic_rooms_do_not_name_the_miniature_s_kinds(room: str) -> None:
    kinds = set(BENCHMARK.metrics) - set(METRICS) | {"facts_replayed", "miniature"}
    kinds -= {"caption", "count", "existence", "position"}  # public names
    for file in (Path(mono_internvl.__file__).parent / room).rglob("*.py"):
        texts = {
            n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)
        }
        assert not kinds & texts, f"{file} names {kinds & texts}"
