"""Yes or no: labels of replies, and what MME and HallusionBench count of them.

Source: InternVL's `eval/mme`, VLMEvalKit's `yorn`, lmms-eval's `tasks/mme`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from mono_internvl.evaluation.metrics.vqa import strip_punctuation

PERCEPTION = (
    "OCR",
    "artwork",
    "celebrity",
    "color",
    "count",
    "existence",
    "landmark",
    "position",
    "posters",
    "scene",
)
"""MME's subtasks of perception, 200 points each."""

COGNITION = (
    "code_reasoning",
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
)
"""MME's subtasks of cognition, 200 points each."""

_CHINESE = re.compile("[\u4e00-\u9fa5]")
_LABEL_CHARACTERS = 4


def mme_processed(reply: str) -> str:
    """What InternVL writes to MME's results file: Chinese and true/false answers in English."""
    for said, meant in (("\n", ""), ("不是", "No"), ("是", "Yes"), ("否", "No")):
        reply = reply.replace(said, meant)
    return _CHINESE.sub("", reply.lower().replace("true", "yes").replace("false", "no"))


def mme_label(processed: str) -> str:
    """Yes or no within the first four characters, else "other": so "None" is no."""
    beginning = processed[:_LABEL_CHARACTERS]
    return "yes" if "yes" in beginning else "no" if "no" in beginning else "other"


def mme_label_lmms(reply: str) -> str:
    """The same of lmms-eval: stripped, without periods, and "y" and "n" count."""
    said = reply.lower().strip().replace(".", "")
    if len(said) == 1:
        return {"y": "yes", "n": "no"}.get(said, "other")
    return mme_label(said)


def yes_or_no(reply: str) -> str:
    """ "Yes" or "No" where one of them alone is among the words, else "Unknown" (VLMEvalKit)."""
    words = strip_punctuation(reply.lower()).split()
    has_yes, has_no = "yes" in words, "no" in words
    return "Unknown" if has_yes == has_no else "Yes" if has_yes else "No"


def mme_subtask(hits: Iterable[tuple[Hashable, bool]]) -> float:
    """Points of one subtask, up to 200: accuracy over questions plus over images, in percent.

    Args:
        hits: Image of each question and whether its answer was right. An image counts with both
            of its two questions.
    """
    images: dict[Hashable, list[bool]] = defaultdict(list)
    for image, is_right in hits:
        images[image].append(bool(is_right))
    if not images:
        return 0.0
    num_questions = sum(map(len, images.values()))
    right = sum(map(sum, images.values()))
    both = sum(len(found) > 1 and all(found) for found in images.values())
    return 100 * right / num_questions + 100 * both / len(images)


def mme_total(points: Mapping[str, float]) -> dict[str, float]:
    """Perception (of 2000), cognition (of 800) and their sum, from the points of subtasks."""
    perception = float(sum(points.get(name, 0.0) for name in PERCEPTION))
    cognition = float(sum(points.get(name, 0.0) for name in COGNITION))
    return {"perception": perception, "cognition": cognition, "sum": perception + cognition}


def hallusion_rating(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """HallusionBench in percent.

    Args:
        rows: Each with its `index` (category, its kind, image or not, set, figure, question), its
            `l2_category` and whether it was answered rightly (`correct`).

    Returns:
        `aAcc` over questions, `fAcc` over figures with every question right, `qAcc` over questions
        right for every figure, and their mean `avg`, which papers report.
    """
    figures: dict[Hashable, list[bool]] = defaultdict(list)
    questions: dict[Hashable, list[bool]] = defaultdict(list)
    for row in rows:
        _, _, _, group, figure, question = str(row["index"]).split("_")[:6]
        kind, is_right = row["l2_category"], bool(row["correct"])
        figures[kind, group, figure].append(is_right)
        questions[kind, group, question].append(is_right)
    found = {
        "aAcc": _percent([bool(row["correct"]) for row in rows]),
        "fAcc": _percent([all(group) for group in figures.values()]),
        "qAcc": _percent([all(group) for group in questions.values()]),
    }
    return {**found, "avg": sum(found.values()) / len(found)}


def _percent(values: Sequence[bool]) -> float:
    return 100 * sum(values) / len(values) if values else 0.0
