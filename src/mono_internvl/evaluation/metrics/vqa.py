"""Short answers that ten people gave: the VQA normaliser and the soft accuracy over their answers.

Source: the EvalAI rules of VQA and TextVQA, as InternVL's evaluation (`internvl`) and VLMEvalKit at
058f673 (`vlmevalkit`) apply them; the quirks named below are theirs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

NUM_ANSWERS = 10
"""People who answered each question of VQAv2, OKVQA and TextVQA."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The look-behind of the official expression never forbids anything; no more than 32 periods go,
# because a flag is passed where the number of replacements belongs.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
_COUNTED = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(n) for n, word in enumerate(_COUNTED.split())} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
_WITH_NOT = (
    "ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn needn oughtn shan shouldn "
    "wasn weren won wouldn"
)
_WITH_NOT_HAVE = "couldn hadn mightn shouldn wouldn"
_WITH_HAVE = "could might must not should they we what where who would you"
_WITH_HAD_HAVE = "he it she somebody someone something there they we who you"
_PAIRS = (
    "hed he'd|hes he's|howd how'd|howll how'll|hows how's|itd it'd|itll it'll|maam ma'am|"
    "oclock o'clock|somebody'd somebodyd|somebodyll somebody'll|somebodys somebody's|"
    "someoned someone'd|someonell someone'll|someones someone's|somethingd something'd|"
    "somethingll something'll|thats that's|thered there'd|therere there're|theres there's|"
    "theyd they'd|theyll they'll|theyre they're|twas 'twas|whatll what'll|whatre what're|"
    "whats what's|whens when's|whered where'd|wheres where's|whod who'd|wholl who'll|whos who's|"
    "whyll why'll|whyre why're|whys why's|yall y'all|yall'll y'all'll|y'allll y'all'll|"
    "yall'd've y'all'd've|y'alld've y'all'd've|y'all'dve y'all'd've|youd you'd|youll you'll|"
    "youre you're|ow's'at 'ow's'at|'ows'at 'ow's'at|'ow'sat 'ow's'at"
)


def _contractions() -> dict[str, str]:
    """Word -> with its apostrophes; keys of the official table with capitals never apply."""
    table = dict(pair.split() for pair in _PAIRS.split("|"))
    for stem in _WITH_NOT.split():
        table[f"{stem}t"] = f"{stem}'t"
    for stem in _WITH_NOT_HAVE.split():
        table[f"{stem}'tve"] = table[f"{stem}t've"] = f"{stem}'t've"
    for stem in _WITH_HAVE.split():
        table[f"{stem}ve"] = f"{stem}'ve"
    for stem in _WITH_HAD_HAVE.split():
        table[f"{stem}d've"] = table[f"{stem}'dve"] = f"{stem}'d've"
    return table


_CONTRACTIONS = _contractions()


def strip_punctuation(text: str) -> str:
    """The text without marks; one that no space touches becomes a space.

    Where a comma stands between digits anywhere, every mark goes without a trace.
    """
    drops_all = _DIGIT_COMMA_DIGIT.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        is_loose = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if is_loose or drops_all else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    kept = (word for word in words if word not in _ARTICLES)
    return " ".join(_CONTRACTIONS.get(word, word) for word in kept)


def normalise_vlmevalkit(text: str) -> str:
    """Marks, numbers, articles and contractions; commas and possessives are left to the marks."""
    return _words(strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def normalise(text: str) -> str:
    """The EvalAI normaliser: lower case, no commas or question marks, possessives apart, then
    marks, numbers, articles and contractions."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise_vlmevalkit(text.strip())


def soft_accuracy(
    prediction: str,
    answers: Sequence[str],
    normaliser: Callable[[str], str] = normalise,
    num_answers: int | None = NUM_ANSWERS,
) -> float:
    """min(1, people of the other nine who said so / 3), averaged over the ten people left out.

    Args:
        prediction: The answer.
        answers: What people said.
        normaliser: Of both.
        num_answers: People that there must be, else 0 as the official scorer refuses the item; None
            takes any number.
    """
    if not answers or (num_answers is not None and len(answers) != num_answers):
        return 0.0
    said = normaliser(prediction)
    same = Counter(normaliser(answer) for answer in answers)[said]
    left_out = [same - 1] * same + [same] * (len(answers) - same)
    return sum(min(1.0, others / 3) for others in left_out) / len(answers)
