"""What an evaluation on published benchmarks leaves behind: a result for each, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mono_internvl.errors import SampleError
from mono_internvl.runs.folder import write_whole

RESULTS = "results.json"

PAPER, CORRECTED = "paper", "corrected"
"""Scoring as the published figures were made, and without the quirks that are known by now."""


@dataclass(frozen=True)
class PublishedScore:
    """A score that others have published, shown beside ours and never mixed with it.

    Attributes:
        model: Whose.
        score: In the benchmark's unit.
        source: Paper and table, and the split where it is another one.
    """

    model: str
    score: float
    source: str


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """What a model reached on one benchmark.

    Attributes:
        name: That the benchmark is asked for by.
        title: For tables.
        split: Of the data.
        unit: Of the scores.
        top: Best possible score.
        scores: By scoring protocol, `paper` first; None where it needs what is not there.
        details: Parts of the score, by name.
        answered: Questions with an answer.
        questions: Published size of the split; None where it is not.
        protocol: How it was asked.
        data_md5: Of the data; None where it was scored without them.
        judge: Name of the model that judged answers; None where none did.
        notes: What a reader has to know to compare.
        published: Scores of others.
    """

    name: str
    title: str
    split: str
    unit: str
    top: float
    scores: Mapping[str, float | None]
    answered: int
    questions: int | None
    details: Mapping[str, float] = field(default_factory=dict)
    protocol: Mapping[str, Any] | None = None
    data_md5: str | None = None
    judge: str | None = None
    notes: tuple[str, ...] = ()
    published: tuple[PublishedScore, ...] = ()


def write_results(folder: Path, model: str, results: Sequence[BenchmarkResult]) -> Path:
    """The results of a model, whole or not at all."""
    file = folder / RESULTS
    rows = {"model": model, "results": [asdict(one) for one in results]}
    write_whole(file, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    return file


def read_results(folder: Path) -> tuple[str, list[BenchmarkResult]]:
    """A model's name and its results.

    Raises:
        SampleError: There are none, or they are not what `write_results` writes.
    """
    file = folder / RESULTS
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        results = [
            BenchmarkResult(
                **{
                    **row,
                    "notes": tuple(row["notes"]),
                    "published": tuple(PublishedScore(**one) for one in row["published"]),
                }
            )
            for row in found["results"]
        ]
        return str(found["model"]), results
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SampleError(f"{file}: not results of an evaluation ({error!r})") from error
