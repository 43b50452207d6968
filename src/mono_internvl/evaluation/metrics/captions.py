"""Captions against references: tokens of the Penn Treebank, and CIDEr-D.

Papers tokenise with Stanford CoreNLP 3.4.1, which needs Java; `ptb_tokens` is our own reading of
its rules, and whatever was scored with it says so.

Source: CIDEr (arXiv 1411.5726), as `pycocoevalcap` 1.2 computes it.
"""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_NUM_GRAMS = 4
_SIGMA = 6.0
_SCALE = 10.0

# Compared after lower-casing, so "-lrb-" and its like stay.
_DROPPED = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--",
     "...", ";")
)  # fmt: skip
_BRACKETS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"
}  # fmt: skip
_TYPED = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201c": "``", "\u201d": "''", "\u2013": "--",
        "\u2014": "--", "\u2026": "...", "\u00a0": " ", "\u00ad": "", "\u00a2": " cents ",
        "\u00a3": "#", "\u20ac": "$", "\u00bd": "1\\/2", "\u00bc": "1\\/4", "\u00be": "3\\/4",
    }
)  # fmt: skip
_JOINED = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na",
    "gimme": "gim me", "lemme": "lem me", "'tis": "'t is", "'twas": "'t was",
}  # fmt: skip
_ABBREVIATION = (
    "mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|inc|corp|ltd|co|bros|ave|blvd|rd|mt|gen|col|capt|lt|sgt|gov|"
    "sen|rev|hon|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|approx|dept|est"
)
_TOKEN = re.compile(
    rf"""
    (?:https?://|www\.)\S+[\w/]                       # addresses
  | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
  | (?:[a-z]\.){{2,}}                                  # u.s.a., a.m.
  | (?:{_ABBREVIATION}|(?:no|fig)(?=\.\s\d))\.          # dr. who, no. 5
  | 'n'?(?![\w])|'em(?![\w])|'\d0s(?![\w])              # rock 'n' roll, the '80s
  | \d+\s?\\?/\s?\d+(?![\w])                           # fractions
  | \d*(?:[.,:]\d+)+(?:-\w+)*(?:'s(?!\w))?
  | [^\W_]+(?:['&_/-][^\W_]+)*(?:_\w+)*                # words, with what joins them
  | \.\.\.+|--+|``|''|[^\s]
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(r"(.+?)(n't|'(?:s|m|d|re|ve|ll))\Z")


def ptb_tokens(caption: str) -> str:
    """A caption as Penn Treebank tokens in lower case, marks left out, spaces between them.

    An approximation of the Stanford tokenizer: ours, in Python.
    """
    text = caption.translate(_TYPED).replace("&amp;", "&").lower()
    text = " ".join(text.split())
    tokens: list[str] = []
    for found in _TOKEN.finditer(text):
        token = found[0]
        if token in _JOINED:
            tokens += _JOINED[token].split()
        elif (parts := _CLITIC.fullmatch(token)) and token[0].isalnum():
            tokens += _JOINED.get(parts[1], parts[1]).split()
            tokens.append(parts[2])
        else:
            tokens.append(_form(token))
    return " ".join(token for token in tokens if token not in _DROPPED)


def _form(token: str) -> str:
    """A token as the treebank writes it: brackets by name, slashes escaped, dashes in pairs."""
    if set(token) <= {"."} and len(token) > 1:
        return "..."
    if set(token) <= {"-"} and len(token) > 1:
        return "--"
    if token == '"':
        return "''"
    if "/" in token and "://" not in token and "\\/" not in token:
        token = re.sub(r"\s?/\s?", r"\\/", token)
    return _BRACKETS.get(token, token)


@dataclass(frozen=True)
class Tokenizer:
    """A way to tokenise captions.

    Attributes:
        name: Of it, part of a result.
        tokens: A caption's tokens with spaces between them.
        is_exact: Whether it is the one that papers use.
    """

    name: str
    tokens: Callable[[Sequence[str]], list[str]]
    is_exact: bool


def best_tokenizer() -> Tokenizer:
    """Stanford's, where `pycocoevalcap` and Java are installed; else ours, flagged."""
    try:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError:
        PTBTokenizer = None
    if PTBTokenizer is None or shutil.which("java") is None:
        return Tokenizer("python (approximate)", lambda texts: [*map(ptb_tokens, texts)], False)

    def tokens(texts: Sequence[str]) -> list[str]:
        asked = {number: [{"caption": text}] for number, text in enumerate(texts)}
        found = PTBTokenizer().tokenize(asked)
        return [found[number][0] for number in range(len(texts))]

    return Tokenizer("stanford-corenlp-3.4.1", tokens, True)


def cider(
    references: Mapping[str, Sequence[str]], predictions: Mapping[str, str]
) -> tuple[float, list[float]]:
    """CIDEr-D of tokenised captions; weights come from the references of this set.

    Args:
        references: Tokens with spaces between them, of each image.
        predictions: One of each image.

    Returns:
        Mean over the images and score of each, 0 to 10; papers report 100 times as much. Of a
        single image it is 0: no n-gram is rarer than another.
    """
    if not references:
        return 0.0, []
    counted = {key: [_grams(text) for text in texts] for key, texts in references.items()}
    document_count: Counter[tuple[str, ...]] = Counter()
    for texts in counted.values():
        document_count.update({gram for text in texts for gram in text})
    log_images = math.log(len(references))

    def vector(grams: Counter[tuple[str, ...]]) -> tuple[list[dict[tuple[str, ...], float]], int]:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(_NUM_GRAMS)]
        length = 0
        for gram, count in grams.items():
            rarity = log_images - math.log(max(1.0, document_count[gram]))
            weights[len(gram) - 1][gram] = count * rarity
            length += count if len(gram) == 2 else 0
        return weights, length

    scores = []
    for key, texts in counted.items():
        said = vector(_grams(predictions[key]))
        total = sum(_similarity(said, vector(text)) for text in texts)
        scores.append(_SCALE * total / (_NUM_GRAMS * len(texts)) if texts else 0.0)
    return sum(scores) / len(scores), scores


def _grams(text: str) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(
        tuple(words[i : i + n]) for n in range(1, _NUM_GRAMS + 1) for i in range(len(words) - n + 1)
    )


def _similarity(
    said: tuple[list[dict[tuple[str, ...], float]], int],
    true: tuple[list[dict[tuple[str, ...], float]], int],
) -> float:
    """Sum over n of clipped cosines, less where the lengths differ."""
    penalty = math.exp(-((said[1] - true[1]) ** 2) / (2 * _SIGMA**2))
    total = 0.0
    for ours, theirs in zip(said[0], true[0], strict=True):
        norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        if norms:
            shared = sum(min(w, theirs[g]) * theirs[g] for g, w in ours.items() if g in theirs)
            total += shared / norms
    return penalty * total
