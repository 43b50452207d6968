"""Scores worked out by hand."""

from __future__ import annotations

import pytest

from mono_internvl.errors import SampleError
from mono_internvl.evaluation import metrics

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
    count = metrics.caption_attributes(prediction, truth)
    assert (count.correct, count.total) == (correct, total)


def test_caption_attributes_uses_best_matching_not_order() -> None:
    # matched in order: 1 (size) + 1 (size) right; the other way round: 3 + 3
    said = "a large blue star at the bottom and a small red circle at the top left"
    truth = [["large", "red", "circle", "top left"], ["small", "blue", "star", "bottom"]]
    assert metrics.caption_attributes(said, truth).correct == 6


def test_caption_score_is_floored_at_zero() -> None:
    said = " and ".join(["a small green cross at the right"] * 9)
    assert metrics.caption_attributes(said, [CIRCLE]).correct == -8
    assert metrics.score({"kind": "caption", "attributes": [CIRCLE]}, said) == 0.0


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("ZORA", "ZORA", 1.0),
        ("zora", "ZORA", 1.0),
        ("ZORE", "ZORA", 0.75),
        ("ZOR", "ZORA", 0.75),
        ("ZORAB", "ZORA", 0.75),
        ("OZRA", "ZORA", 0.5),
        ("", "ZORA", 0.0),
        ("a very long wrong answer", "12", 0.0),
        ("", "", 1.0),
    ],
)
def test_reading_score_hand_computed(prediction: str, answer: str, expected: float) -> None:
    assert metrics.reading_score(prediction, answer) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<ref>red circle</ref><box>[[1, 20, 300, 1000]]</box>", 1.0),
        ("red circle[[1,20,300,1000]]", 1.0),
        ("[1, 20, 300, 1000]", 1.0),
        ("[[ 1, 20, 300, 510 ], [1, 20, 300, 1000]]", 0.5),
        ("[[300, 20, 1, 1000]]", 0.0),
        ("[[1, 20, 300]]", 0.0),
        (f"[[1, 20, 300, {'9' * 400}]]", 0.0),
        ("nothing", 0.0),
    ],
)
def test_grounding_score_reads_the_first_box(text: str, expected: float) -> None:
    assert metrics.grounding_score(text, (1, 20, 300, 1000)) == expected


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),
        ((0, 0, 10, 10), (5, 5, 15, 15), 25 / 175),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),
        ((0, 0, 10, 10), (2, 2, 4, 4), 0.04),
    ],
)
def test_intersection_over_union_hand_computed(
    first: tuple[int, ...], second: tuple[int, ...], expected: float
) -> None:
    assert metrics.intersection_over_union(first, second) == pytest.approx(expected)
    assert metrics.intersection_over_union(second, first) == pytest.approx(expected)


def test_exact_match_ignores_case_and_full_stop_only() -> None:
    assert metrics.exact_match(" Top left.\n", "top left") == 1.0
    assert metrics.exact_match("top", "top left") == 0.0


@pytest.mark.parametrize(
    ("record", "prediction", "expected"),
    [
        ({"kind": "colour", "answer": "red"}, "Red", 1.0),
        ({"kind": "novel", "answer": "red star"}, "red circle", 0.0),
        ({"kind": "ocr", "answer": "AB"}, "AC", 0.5),
        ({"kind": "grounding", "answer": "", "box": [0, 0, 10, 10]}, "[[0, 0, 10, 5]]", 0.5),
        ({"kind": "grounding", "answer": "", "box": [0, 0, 10, 10]}, "no idea", 0.0),
        ({"kind": "caption", "answer": "", "attributes": [CIRCLE]}, "a large red star.", 0.5),
    ],
)
def test_score_dispatches_on_kind(
    record: dict[str, object], prediction: str, expected: float
) -> None:
    assert metrics.score(record, prediction) == expected


@pytest.mark.parametrize(
    "truth",
    [
        {"kind": "grounding", "box": [1, 2, 3]},
        {"kind": "grounding", "box": [1, 2, 3, "4"]},
        {"kind": "grounding", "box": [1, 2, 3, float("nan")]},
        {"kind": "grounding", "box": [3, 2, 1, 4]},
        {"kind": "grounding", "box": "[1, 2, 3, 4]"},
        {"kind": "grounding", "box": {"x": 1}},
        {"kind": "caption", "attributes": []},
        {"kind": "caption", "attributes": ["red"]},
        {"kind": "caption", "attributes": [["large", "red", "circle"]]},
        {"kind": "caption", "attributes": [["large", "red", "circle", 7]]},
        {"kind": "caption", "attributes": "a red circle"},
        {"kind": "colour", "answer": ["red"]},
        {"kind": "ocr", "answer": 7},
    ],
)
def test_score_refuses_malformed_truth(truth: dict[str, object]) -> None:
    field = next(name for name in truth if name != "kind")
    with pytest.raises(SampleError, match=f"r7: `{field}` is .*correct the record"):
        metrics.score({"id": "r7", **truth}, "[[1, 2, 3, 4]]")


@pytest.mark.parametrize("record", [{"answer": "x"}, {"kind": "caption", "answer": "x"}])
def test_score_names_the_missing_key(record: dict[str, object]) -> None:
    with pytest.raises(SampleError, match=r"kind|attributes"):
        metrics.score(record, "x")
