"""Free text against its truths: ANLS, relaxed accuracy, exact match, substrings of OCRBench.

Source: InternVL's `eval/vqa`, VLMEvalKit's `vqa_eval` and `ocrbench`, lmms-eval's `api/metrics`.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence

from rapidfuzz.distance import Levenshtein

ANLS_THRESHOLD = 0.5
"""Similarity below which an answer counts nothing; the threshold itself counts."""

RELAXED_TOLERANCE = 0.05
"""Relative error that ChartQA forgives."""

FORMULA = "Handwritten Mathematical Expression Recognition"
"""The OCRBench category that is compared with its case and without its spaces."""

OCRBENCH_GROUPS = {
    "Text Recognition": (
        "Regular Text Recognition",
        "Irregular Text Recognition",
        "Artistic Text Recognition",
        "Handwriting Recognition",
        "Digit String Recognition",
        "Non-Semantic Text Recognition",
    ),
    "Scene Text-centric VQA": ("Scene Text-centric VQA",),
    "Doc-oriented VQA": ("Doc-oriented VQA",),
    "Key Information Extraction": ("Key Information Extraction",),
    FORMULA: (FORMULA,),
}
"""What OCRBench adds up: 300, 200, 200, 200 and 100 questions."""


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one question: that to the nearest answer.

    Edits are counted between squeezed lower-case texts but divided by the longer text as it was
    given, so that padding is forgiven.
    """
    said = _squeezed(prediction)
    best = 0.0
    for answer in answers:
        length = max(len(answer.upper()), len(prediction.upper()))
        edits = Levenshtein.distance(_squeezed(answer), said)
        best = max(best, 1 - edits / length if length else 1.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def _squeezed(text: str) -> str:
    return " ".join(text.lower().split())


def relaxed_match(prediction: str, answer: str, *, is_swapped: bool) -> float:
    """1 where both are numbers within 5 %, or the same text whatever its case; else 0.

    Args:
        prediction: What was said.
        answer: The truth.
        is_swapped: Whether the error is relative to the prediction, as in InternVL's scorer and so
            in the paper's figures, instead of the truth.
    """
    said = prediction.strip()
    target, other = (said, answer) if is_swapped else (answer, said)
    target_number, other_number = _number(target), _number(other)
    if other_number is not None and target_number:
        error = abs(other_number - target_number) / abs(target_number)
        return float(error <= RELAXED_TOLERANCE)
    return float(target.lower() == other.lower())


def relaxed_accuracy(prediction: str, answers: str | Sequence[str], *, is_swapped: bool) -> float:
    """The best `relaxed_match` with any of the truths."""
    truths = [answers] if isinstance(answers, str) else answers
    return max(
        (relaxed_match(prediction, truth, is_swapped=is_swapped) for truth in truths), default=0.0
    )


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def exact_match(prediction: str, answers: str | Sequence[str]) -> float:
    """1 where it is one of the truths in lower case without outer white space."""
    truths = [answers] if isinstance(answers, str) else answers
    said = prediction.strip().lower()
    return float(any(said == truth.strip().lower() for truth in truths))


def exact_match_without_marks(prediction: str, answer: str) -> float:
    """1 where both are the same in lower case without ASCII punctuation, as lmms-eval compares."""
    marks = str.maketrans("", "", string.punctuation)
    return float(prediction.lower().translate(marks) == answer.lower().translate(marks))


def gqa_answer(prediction: str) -> str:
    """What GQA's scorer compares with the truth: lower case, no periods at the end."""
    return prediction.rstrip(".").lower()


def ocrbench_hit(prediction: str, answers: Iterable[str], category: str) -> int:
    """1 where any truth is a part of what was said."""

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if category == FORMULA else text.lower().strip()

    said = plain(prediction)
    return int(any(plain(answer) in said for answer in answers))


def ocrbench_total(hits: Iterable[tuple[str, int]]) -> dict[str, float]:
    """Points by group and in all, of 1000.

    Args:
        hits: Category and `ocrbench_hit` of each question.

    Returns:
        Points by group, `Final Score` and, of 100, `Final Score Norm`.
    """
    points: Mapping[str, float] = dict.fromkeys(OCRBENCH_GROUPS, 0.0)
    group_of = {name: group for group, names in OCRBENCH_GROUPS.items() for name in names}
    total = dict(points)
    for category, hit in hits:
        if category in group_of:
            total[group_of[category]] += hit
    final = sum(total.values())
    return {**total, "Final Score": final, "Final Score Norm": final / 10}
