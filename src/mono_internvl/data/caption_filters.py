"""What a model says of an image and what is no caption: too short, too long, cut, again and again,
or a refusal."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from mono_internvl.chat_client import Reply

_REFUSALS = re.compile(
    r"\b(i'?m|i am|we are) (very )?(sorry|unable|not able)\b|\bsorry, (but )?i\b"
    r"|\bi (cannot|can'?t|can not|could not|won'?t|do not|don'?t) (help|assist|see|view|provide"
    r"|identify|describe|process|access|determine)\b"
    r"|\bas an? (ai|artificial intelligence|language model|vision model)\b"
    r"|\b(unable|impossible) to (describe|caption|see|view|determine|process)\b"
    r"|\bno image (was|is|has been)\b|抱歉|无法(提供|描述|查看|识别)|作为.{0,6}(人工智能|模型)",
    re.IGNORECASE,
)
_LEADS = re.compile(
    r"^(sure|certainly|of course|okay|ok)[!,.:]\s*|^(here is|here's) [^:\n]{0,60}:\s*"
    r"|^(one-sentence )?caption\s*:\s*",
    re.IGNORECASE,
)
_QUOTES = "\"'“”‘’«»`*"
_CJK = re.compile(r"[\u3400-\u9fff\u3040-\u30ff\uac00-\ud7af]")
_WORD = re.compile(r"[\u3400-\u9fff\u3040-\u30ff\uac00-\ud7af]|[^\W_]+")
_RUN = 3  # the same word, or group of words, so often without a break
_GROUP = 4  # words of a group that may come twice, not three times
_LONGEST_PERIOD = 6


@dataclass(frozen=True)
class CaptionFilter:
    """Limits of a caption, in words; of languages without spaces, in characters.

    Attributes:
        min_words: Fewest.
        max_words: Most.
    """

    min_words: int = 3
    max_words: int = 60

    def why_not(self, reply: Reply) -> str:
        """Why a reply is no caption, in a word or two; "" if it is one."""
        text = clean(reply.text)
        words = _WORD.findall(text.lower())
        if not words:
            return "empty"
        if _REFUSALS.search(text):
            return "refusal"
        if _repeats(words):
            return "repetition"
        if reply.is_cut:
            return "cut off"
        if len(words) < self.min_words:
            return "too short"
        return "too long" if len(words) > self.max_words else ""


def clean(text: str) -> str:
    """A reply as one line, without what it begins with or is wrapped in."""
    line = " ".join(text.split()).strip(_QUOTES + " ")
    while (shorter := _LEADS.sub("", line, count=1).strip(_QUOTES + " ")) != line:
        line = shorter
    return line


def _repeats(words: list[str]) -> bool:
    """Whether words come again and again."""
    for period in range(1, _LONGEST_PERIOD + 1):
        run = 0
        for before, word in zip(words, words[period:], strict=False):
            run = run + 1 if word == before else 0
            if run >= period * (_RUN if period == 1 else _RUN - 1):
                return True
    groups = Counter(tuple(words[i : i + _GROUP]) for i in range(len(words) - _GROUP + 1))
    return max(groups.values(), default=0) > 2
