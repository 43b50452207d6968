"""Scores worked out by hand."""

from __future__ import annotations

import pytest

from mono_internvl.errors import SampleError
from mono_internvl.evaluation.benchmarks.records import RECORDS
from mono_internvl.evaluation.metrics import metric as metrics


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
        ({"kind": "exact", "answer": "red"}, "Red", 1.0),
        ({"kind": "colour", "metric": "exact", "answer": "red"}, "Red", 1.0),
        ({"kind": "signs", "metric": "ocr", "answer": "AB"}, "AC", 0.5),
        ({"kind": "ocr", "answer": "AB"}, "AC", 0.5),
        ({"kind": "grounding", "answer": "", "box": [0, 0, 10, 10]}, "[[0, 0, 10, 5]]", 0.5),
        ({"kind": "grounding", "answer": "", "box": [0, 0, 10, 10]}, "no idea", 0.0),
    ],
)
def test_score_goes_by_metric_or_kind(
    record: dict[str, object], prediction: str, expected: float
) -> None:
    assert RECORDS.score(record, prediction) == expected


@pytest.mark.parametrize(
    "truth",
    [
        {"kind": "grounding", "box": [1, 2, 3]},
        {"kind": "grounding", "box": [1, 2, 3, "4"]},
        {"kind": "grounding", "box": [1, 2, 3, float("nan")]},
        {"kind": "grounding", "box": [3, 2, 1, 4]},
        {"kind": "grounding", "box": "[1, 2, 3, 4]"},
        {"kind": "grounding", "box": {"x": 1}},
        {"kind": "exact", "answer": ["red"]},
        {"kind": "ocr", "answer": 7},
    ],
)
def test_score_refuses_malformed_truth(truth: dict[str, object]) -> None:
    field = next(name for name in truth if name != "kind")
    with pytest.raises(SampleError, match=f"r7: `{field}` is .*correct the record"):
        RECORDS.score({"id": "r7", **truth}, "[[1, 2, 3, 4]]")


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"answer": "x"}, "kind=None"),
        ({"kind": "grounding", "answer": "x"}, "no `box`"),
        ({"kind": "coluor", "answer": "x"}, "kind='coluor' is no metric .*expected one of exact"),
        ({"kind": "exact", "metric": "bleu", "answer": "x"}, "metric='bleu' is no metric"),
        ({"kind": "exact", "metric": None, "answer": "x"}, "metric=None is no metric"),
    ],
)
def test_score_refuses_what_it_does_not_know(record: dict[str, object], named: str) -> None:
    with pytest.raises(SampleError, match=named):
        RECORDS.score(record, "x")
