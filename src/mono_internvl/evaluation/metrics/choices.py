"""Letters out of replies to multiple-choice questions, and what is counted of them.

Source: VLMEvalKit's `matching_util` at 058f673 and e8e78f0, InternVL's MMBench, ScienceQA and SEED
scripts, lmms-eval's ScienceQA, Video-MME's regular expression.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

UNDECIDED = "Z"
"""The letter of no option: a refusal, or a reply that names none."""

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_FAILED_CALL = "Failed to obtain answer via API"
_TO_SPACE = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_LAST_WORDS = 5
_VIDEO_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
    "Answer:",
    "Option:",
)
_SHORT_NAMES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


def infer_choice(reply: str, choices: Mapping[str, Any], *, is_strict: bool = False) -> str | None:
    """The option that a reply means, by its letter or else by its text (VLMEvalKit).

    One letter alone among the words decides, so "A" at the beginning of a sentence does too; two
    letters decide nothing, and then one option's text in the reply does.

    Args:
        reply: What was said.
        choices: Text of each letter.
        is_strict: The rules of 2026 instead of those of the paper's time: the letter has to stand
            among the last words, "answer is X" counts, and option texts are not looked for in a
            reply more than twice as long as all of them.

    Returns:
        The letter, `UNDECIDED` for a refusal, None where nothing decides.
    """
    if _FAILED_CALL not in reply:
        if any(refusal in reply for refusal in _REFUSALS):
            return UNDECIDED
        words = reply.translate(_TO_SPACE).split()
        named = [letter for letter in choices if letter in words]
        is_late = not is_strict or (
            len(named) == 1 and words.index(named[0]) > len(words) - _LAST_WORDS
        )
        if len(named) == 1 and is_late:
            return named[0]
        if not named and UNDECIDED in words:
            return UNDECIDED
        stated = _ANSWER_IS.search(reply) if is_strict else None
        if stated and stated[1].upper() in choices:
            return stated[1].upper()
    said = reply.lower()
    if is_strict and len(said) > 2 * sum(len(str(text)) for text in choices.values()):
        return None
    found = [letter for letter, text in choices.items() if str(text).lower() in said]
    return found[0] if len(found) == 1 else None


def is_choice(
    reply: str, choices: Mapping[str, Any], answer: str, *, is_strict: bool = False
) -> bool:
    """Whether a reply means the right option; one that means none is wrong."""
    return (infer_choice(reply, choices, is_strict=is_strict) or UNDECIDED) == answer


def first_letter(reply: str, options: Mapping[str, Any]) -> str:
    """The letter that InternVL's MMBench, CCBench, MMMU and SEED scripts read.

    A single character stands for itself, a first character that is an option's letter for that,
    else the first option whose text occurs; what none of that fits stays as it is, and is wrong.
    """
    said = reply.strip()
    if len(said) == 1:
        return said
    if said[:1] in options and said:
        return said[0]
    return next((letter for letter, text in options.items() if str(text) in said and said), said)


def science_letter(reply: str, options: Mapping[str, Any]) -> str:
    """`first_letter`, after "X." and "(X)" have been read whatever X is; "" where that breaks off.

    The official script fails on "(X" and on nothing; both are no answer here.
    """
    said = reply.strip()
    if len(said) <= 1 or said[0] in options:
        return said[:1]
    if said[1] == ".":
        return said[0]
    if said[0] == "(":
        if len(said) == 2:
            return ""
        if said[2] == ")":
            return said[1]
    return first_letter(said, options)


def is_science_answer(reply: str, answer: str) -> bool:
    """Whether lmms-eval takes a ScienceQA reply: the letter alone, or "X." with a capital."""
    said = reply.strip()
    if said.lower() == answer.lower():
        return True
    return len(said) >= 2 and said[0].isupper() and said[1] == "." and said[0] == answer


def seed_letter(reply: str) -> str:
    """The first character that is no white space."""
    return reply.strip()[:1]


def video_letter(reply: str) -> str:
    """The first capital A to D behind the usual beginnings, "" if there is none."""
    said = reply.strip()
    for prefix in _VIDEO_PREFIXES:
        said = said.replace(prefix, "")
    found = re.search("[ABCD]", said)
    return found[0] if found else ""


def circular_hit(
    rounds: Iterable[tuple[str, Mapping[str, Any], str]], *, is_strict: bool = False
) -> int:
    """1 where every rotation of a question is answered rightly.

    Args:
        rounds: Reply, choices and right letter of each rotation.
        is_strict: See `infer_choice`.
    """
    return int(all(is_choice(*one, is_strict=is_strict) for one in rounds))


def rotations(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options of each round: in round k, letter i shows text (i + k) modulo their number."""
    letters, texts = list(options), list(options.values())
    count = len(letters)
    return [
        {letter: texts[(i + k) % count] for i, letter in enumerate(letters)} for k in range(count)
    ]


def report_accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean hit of each split: over all, by ability (short name) and by category.

    Args:
        rows: Each `hit`, and where there are `split`, `l2-category` and `category`.

    Returns:
        By split, then by group; None where a split has none of a group.
    """
    splits = dict.fromkeys(str(row.get("split", "none")) for row in rows)
    report: dict[str, dict[str, float | None]] = {}
    for split in splits:
        own = [row for row in rows if str(row.get("split", "none")) == split]
        report[split] = {"Overall": _mean_hit(own)}
        for field in ("l2-category", "category"):
            for name in sorted({str(row[field]) for row in rows if field in row}):
                short = _SHORT_NAMES.get(name, name) if field == "l2-category" else name
                report[split][short] = _mean_hit([r for r in own if str(r.get(field)) == name])
    return report


def _mean_hit(rows: Sequence[Mapping[str, Any]]) -> float | None:
    return sum(float(row["hit"]) for row in rows) / len(rows) if rows else None
