"""What tables add up: the paper's two averages, MM-Vet by capability."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

MULTIMODAL = ("MMB", "MMVet", "MMMU", "MME", "MathVista", "SEED_I", "OCRBench", "HallB", "CCB")
"""Columns of the paper's Table 2."""

VQA = ("TextVQA", "SQA_I", "GQA", "DocVQA", "AI2D", "ChartQA", "InfoVQA")
"""Columns of the paper's Table 3."""

_DIVISORS = {"MME": 28.0, "OCRBench": 10.0}  # of 2800 and of 1000 points, to percent


def average(scores: Mapping[str, float | None], columns: Iterable[str]) -> float | None:
    """Mean of the columns that there are, MME and OCRBench in percent of all points."""
    found = [
        score / _DIVISORS.get(name, 1.0)
        for name in columns
        if (score := scores.get(name)) is not None
    ]
    return sum(found) / len(found) if found else None


def mmvet_report(graded: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Mean grade in percent, by capability and over all.

    A sample of one capability counts twice in it, as VLMEvalKit adds up: it counts for the
    capability and for the combination, which bear one name.

    Args:
        graded: Of each sample, its capabilities with commas between them and its grade in [0, 1].
    """
    grades: dict[str, list[float]] = defaultdict(list)
    for capabilities, grade in graded:
        names = [name.strip() for name in capabilities.split(",")]
        for name in (*names, *(names if len(names) == 1 else ()), "Overall"):
            grades[name].append(grade)
    return {name: 100 * sum(found) / len(found) for name, found in grades.items()}
