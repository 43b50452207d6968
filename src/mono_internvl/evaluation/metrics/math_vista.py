"""MathVista: answers out of replies, normalised and compared.

Source: VLMEvalKit's `mathvista` at 058f673, whose figures the paper reports, and InternVL's
`eval/mathvista`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rapidfuzz.distance import Levenshtein

from mono_internvl.evaluation.metrics.choices import infer_choice

_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?|-?\.\d+")
_LIST = re.compile(r"\[[^\[\]]*\]")


@dataclass(frozen=True, kw_only=True)
class MathQuestion:
    """What the answer to a question has to be.

    Attributes:
        question_type: "multi_choice" or "free_form".
        answer_type: "text", "integer", "float" or "list".
        answer: The truth.
        choices: Texts of a multiple-choice question.
        answer_option: The letter of the right one.
        precision: Decimals of a float.
    """

    question_type: str = "free_form"
    answer_type: str = "text"
    answer: str
    choices: Sequence[str] = ()
    answer_option: str | None = None
    precision: float | None = None

    @property
    def is_choice(self) -> bool:
        """Whether letters are asked for."""
        return self.question_type == "multi_choice"

    @property
    def lettered(self) -> dict[str, str]:
        """The choices by letter."""
        return {chr(ord("A") + i): text for i, text in enumerate(self.choices)}


def prefetched(question: MathQuestion, reply: str) -> Any:
    """The answer where a reply is nothing but the right one, or means an option; else False.

    Whoever finds it falsy asks a judge to extract the answer, so a right "0" is asked too.
    """
    if question.is_choice:
        return infer_choice(reply, question.lettered) or False
    said, truth = _typed(question, reply)
    return said if said == truth and said is not None else False


def is_right(question: MathQuestion, extracted: str) -> bool:
    """Whether an extracted answer is the truth.

    Integers have to be written as such ("14.0" is none). Free-form texts and lists never are
    right: the official scorer compares nothing with them.
    """
    if question.is_choice:
        return infer_choice(extracted, question.lettered) == question.answer_option
    said, truth = _typed(question, extracted)
    return said is not None and bool(said == truth)


def _typed(question: MathQuestion, text: str) -> tuple[Any, Any]:
    """Answer and truth as numbers; the answer is None where it is none."""
    kind = {"integer": int, "float": float}.get(question.answer_type)
    if kind is None:
        return None, question.answer
    try:
        said = kind(text)
    except ValueError:
        return None, question.answer
    try:
        return said, kind(question.answer)
    except ValueError:
        return said, question.answer


def quick_extract(reply: str) -> str:
    """What stands behind "Answer:" or "Final answer:" in its line; the whole without them."""
    found = re.search(r"(?:Final answer:|Answer:)\s*(.*)", reply, re.IGNORECASE)
    return found[1].strip() if found else reply


def normalised(question: MathQuestion, extraction: Any) -> str | None:
    """An extracted answer in the form of the truth (InternVL); None where it has not that form.

    A choice is a letter, in brackets or alone, or else the text nearest to it by edits.
    """
    if question.is_choice:
        said = str(extraction).strip()
        if letters := re.findall(r"\(([a-zA-Z])\)", said):
            said = letters[0].upper()
        if said in question.lettered:
            return question.lettered[said]
        return min(question.choices, key=lambda text: Levenshtein.distance(said, text))
    if question.answer_type not in ("integer", "float"):
        return str(extraction)
    try:
        number = float(extraction)
        if question.answer_type == "integer":
            return str(int(number))
        return str(round(number, int(question.precision or 0)))
    except (TypeError, ValueError, OverflowError):
        return None


def is_right_by_rule(question: MathQuestion, reply: str) -> bool:
    """Whether a reply is right as far as rules tell without a judge: not comparable with papers.

    The last number, the last list, the letter or the text nearest to it is its answer; free-form
    texts count where they are the truth.
    """
    said = quick_extract(reply.strip())
    if question.is_choice:
        letter = infer_choice(said, question.lettered)
        if letter is not None:
            return letter == question.answer_option
    elif question.answer_type in ("integer", "float"):
        numbers = _NUMBER.findall(said)
        said = numbers[-1].replace(",", "") if numbers else said
    elif question.answer_type == "list":
        lists = _LIST.findall(said)
        said = lists[-1] if lists else said
        return _plain(said) == _plain(question.answer)
    found = normalised(question, said)
    return found is not None and _plain(found) == _plain(question.answer)


def _plain(text: str) -> str:
    return re.sub(r"\s+", "", text).strip(".").lower()
