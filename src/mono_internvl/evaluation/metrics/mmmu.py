"""MMMU: letters and open answers as its own evaluation reads them.

Source: MMMU's `eval_utils`, which InternVL's evaluation ships, and VLMEvalKit's treatment of open
questions as a choice between the answer and anything else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mono_internvl.evaluation.metrics.choices import infer_choice

_OUTER_MARKS = ",.!?;:'"
_FEW_WORDS = 5
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NO_ANSWER = frozenset(_OUTER_MARKS)
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def parse_letter(reply: str, letters: Sequence[str], texts: Mapping[str, str]) -> str | None:
    """The letter last named: in brackets, else alone, else by its text in a longer reply.

    Returns:
        The letter; None where nothing fits, where the official parser draws one by chance.
    """
    for mark in _OUTER_MARKS:
        reply = reply.strip(mark)
    said = f" {reply} "
    for form in ("({})", " {} "):
        places = {one: said.rfind(form.format(one)) for one in letters}
        if any(place >= 0 for place in places.values()):
            return max(places, key=lambda one: places[one])
    if len(said.split()) > _FEW_WORDS:
        places = {one: said.lower().rfind(text.lower()) for one, text in texts.items()}
        if any(place >= 0 for place in places.values()):
            return max(places, key=lambda one: places[one])
    return None


def is_open_answer(reply: str, answer: str | Sequence[str]) -> bool:
    """Whether the key phrases or numbers of a reply hold an answer; numbers to two decimals."""
    truths = [answer] if isinstance(answer, str) else answer
    wanted = [value for truth in truths for value in _normalised(truth)]
    phrases = _key_phrases(reply)
    found = [
        *phrases,
        *(n for phrase in phrases for form in _NUMBERS for n in form.findall(phrase)),
    ]
    for value in (value for text in found for value in _normalised(text)):
        if isinstance(value, str):
            if any(isinstance(truth, str) and truth in value for truth in wanted):
                return True
        elif value in wanted:
            return True
    return False


def is_open_answer_as_choice(reply: str, answer: str) -> bool:
    """VLMEvalKit's way: A is the answer, B "Other Answers"; a short answer anywhere is a hit."""
    return infer_choice(reply, {"A": answer, "B": "Other Answers"}) == "A"


def _normalised(text: str) -> list[str] | list[float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _key_phrases(reply: str) -> list[str]:
    """What stands behind words such as "is" in each sentence; the whole where there are none."""
    reply = reply.strip().strip(".").lower()
    # The text is in lower case by now, so that only line feeds part sentences, as officially.
    sentences = reply.split("\n")
    phrases = []
    for number, sentence in enumerate(sentences):
        keys = (*_KEYS, "=") if number == len(sentences) - 1 else _KEYS
        shortest = ""
        for key in keys:
            if key in sentence:
                behind = sentence.split(key)[-1].strip()
                if not shortest or len(behind) < len(shortest):
                    shortest = behind
        if shortest and shortest not in _NO_ANSWER:
            phrases.append(shortest)
    return phrases or [reply]
