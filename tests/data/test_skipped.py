"""Skipped records: counted, logged with file and line, limited, carried over a stop."""

from __future__ import annotations

import json
import logging

import pytest

from mono_internvl.data.batches import Skipped
from mono_internvl.data.skipped import SkipCounts
from mono_internvl.errors import SampleError


def _records(number: int, source: str = "laion", reason: str = "too long") -> list[Skipped]:
    return [Skipped(source, reason, f"{source}.jsonl:{n}: {reason}") for n in range(1, number + 1)]


def test_counts_stop_above_the_ratio_and_not_at_it() -> None:
    counts = SkipCounts(0.1)
    counts.note(_records(20))
    counts.add(200, 20)
    counts.check()
    counts.add(1, 1)
    with pytest.raises(
        SampleError, match=r"21 of 201 records .*0\.1, for example laion\.jsonl:1: "
    ):
        counts.check()


def test_counts_judge_no_ratio_of_a_few_records() -> None:
    counts = SkipCounts(0.1)
    counts.add(10, 10)
    counts.check()
    counts.add(1, 1)
    with pytest.raises(SampleError, match="11 of 11 records"):
        counts.check()


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_counts_keep_to_the_ends_of_the_range(ratio: float) -> None:
    counts = SkipCounts(ratio)
    counts.check()
    counts.add(1000, 1)
    if ratio == 0:
        with pytest.raises(SampleError, match="1 of 1,000"):
            counts.check()
    else:
        counts.add(9000, 9000)
        counts.check()


def test_counts_log_the_first_of_each_kind_and_then_tenfold_numbers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counts = SkipCounts(1.0)
    with caplog.at_level(logging.WARNING):
        counts.note(_records(1234))
        counts.note(_records(3, "coyo", "image damaged"))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:10] == [f"skipped laion.jsonl:{n}: too long" for n in range(1, 11)]
    assert lines[10:12] == [
        "skipped 100 of laion (too long), last laion.jsonl:100: too long",
        "skipped 1,000 of laion (too long), last laion.jsonl:1000: too long",
    ]
    assert lines[12:] == [f"skipped coyo.jsonl:{n}: image damaged" for n in range(1, 4)]


def test_table_names_source_reason_number_and_first_most_frequent_first() -> None:
    counts = SkipCounts(1.0)
    counts.note(_records(2, "coyo", "image damaged") + _records(1500))
    first, second = counts.table().splitlines()
    assert first.split() == ["1,500", "laion", "too", "long", "laion.jsonl:1:", "too", "long"]
    assert second.split()[:4] == ["2", "coyo", "image", "damaged"]


def test_saved_counts_go_on_where_they_were() -> None:
    counts = SkipCounts(0.1)
    counts.note(_records(3))
    counts.add(100, 3)
    again = SkipCounts.from_dict(json.loads(json.dumps(counts.to_dict())), 0.1)
    assert again == counts
    assert SkipCounts.from_dict({}, 0.2) == SkipCounts(0.2)
