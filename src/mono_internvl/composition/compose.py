"""From a title to an article with pictures: text, places, captions, candidates, choices.

Source: InternLM-XComposer (web_demo.py): lines are numbered `<Seg i>`, places are chosen, then a
caption for each from what stands before it, four candidates for each caption, of which the model
chooses; no picture twice. Differs: answers are greedy, where it searches five beams; candidates
come from a folder, where it asks a service.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mono_internvl.composition.album import Album, Encoder
from mono_internvl.composition.prompts import LETTERS, Wording
from mono_internvl.errors import PromptError

MOST_ARTICLE_TOKENS = 1680
_MOST_PLACES_TOKENS = 300
_MOST_CAPTION_TOKENS = 100
_MOST_CHOICE_TOKENS = 10
_CAPTION_PENALTY = 5.0
_LONGEST_QUERY = 53  # characters of a caption that candidates are looked for with
_LINES_AHEAD = 2  # that a caption may know of, behind its place
_SEGMENT = re.compile(r"<Seg\s*(\d+)>")
_PLACEHOLDERS = re.compile(r"<image>|<video>")


class Asker(Protocol):
    """Answers one question, without memory of others."""

    def __call__(
        self, question: str, images: Sequence[Path], max_new_tokens: int, penalty: float
    ) -> str:
        """The answer; `<image>` in the question stands for each image."""
        ...


@dataclass(frozen=True)
class Illustration:
    """A picture in an article.

    Attributes:
        line: That it stands behind, from 0.
        caption: That it was looked for with.
        candidates: Nearest first.
        picture: Of them.
        is_chosen: Whether the model named it; else its answer named none, and it is the nearest.
    """

    line: int
    caption: str
    candidates: tuple[Path, ...]
    picture: Path
    is_chosen: bool


@dataclass(frozen=True)
class Article:
    """What came of it.

    Attributes:
        title: As it was asked for.
        lines: Of the text.
        illustrations: In the order of the text.
        has_chosen_places: Whether the model named them; else they are evenly spread.
        notes: What did not go as it should.
    """

    title: str
    lines: tuple[str, ...]
    illustrations: tuple[Illustration, ...]
    has_chosen_places: bool
    notes: tuple[str, ...] = field(default=())


def compose(
    title: str,
    album: Album,
    encoder: Encoder,
    ask: Asker,
    wording: Wording,
    *,
    pictures: int = 4,
    text: str | None = None,
) -> Article:
    """Write an article, or take a text, and illustrate it.

    Args:
        title: Of the article.
        album: Pictures to choose from.
        encoder: That described them.
        ask: The model.
        wording: Of the questions.
        pictures: At most so many; no more than there are lines, or pictures.
        text: To be illustrated as it is; written by the model unless given.

    Raises:
        PromptError: The text is empty.
    """
    if text is None:
        text = ask(wording.article.format(title=_plain(title)), (), MOST_ARTICLE_TOKENS, 1.0)
    lines = tuple(line.strip() for line in _plain(text).splitlines() if line.strip())
    if not lines:
        raise PromptError("the article is empty; give another title, or a text")
    count = max(0, min(pictures, len(lines), len(album.pictures)))
    places, is_chosen = _places(lines, count, ask, wording)
    captions = _captions(lines, places, ask, wording)
    found: list[Illustration] = []
    for place, caption in zip(places, captions, strict=True):
        found.append(_illustrate(lines, place, caption, found, album, encoder, ask, wording))
    return Article(title, lines, tuple(found), is_chosen, album.unread)


def _places(
    lines: Sequence[str], count: int, ask: Asker, wording: Wording
) -> tuple[list[int], bool]:
    """Lines that a picture stands behind, in order, and whether the model named them."""
    if count == 0:
        return [], True
    question = wording.places.format(article=_numbered(lines), count=count)
    said = ask(question, (), _MOST_PLACES_TOKENS, 1.0)
    named = dict.fromkeys(int(number) for number in _SEGMENT.findall(said))
    chosen = [place for place in named if place < len(lines)][:count]
    if chosen:
        return sorted(chosen), True
    return sorted({(2 * number + 1) * len(lines) // (2 * count) for number in range(count)}), False


def _captions(
    lines: Sequence[str], places: Sequence[int], ask: Asker, wording: Wording
) -> list[str]:
    """A caption for each place, from the text up to it and the captions before."""
    captions: list[str] = []
    for place in places:
        earlier = " ".join(f"<Seg{p}>: {c}." for p, c in zip(places, captions, strict=False))
        known = _numbered(lines[: place + 1 + _LINES_AHEAD])
        question = wording.caption.format(
            article=known, earlier=f"{earlier} " if earlier else "", line=place
        )
        said = ask(question, (), _MOST_CAPTION_TOKENS, _CAPTION_PENALTY).strip().lstrip('"“')
        caption = re.split(f"[{wording.quotes}]", said)[0].strip(" .")
        captions.append(_plain(caption) or lines[place])
    return captions


def _illustrate(
    lines: Sequence[str],
    place: int,
    caption: str,
    before: Sequence[Illustration],
    album: Album,
    encoder: Encoder,
    ask: Asker,
    wording: Wording,
) -> Illustration:
    """The picture behind a line."""
    used = [one.picture for one in before]
    candidates = album.nearest(caption[:_LONGEST_QUERY], encoder, len(LETTERS), used)
    letters = LETTERS[: len(candidates)]
    behind = {one.line for one in before}
    context = "\n".join(
        f"{line}\n<image>" if number in behind else line
        for number, line in enumerate(lines[: place + 1])
    )
    question = wording.choice.format(
        context=context, candidates=" ".join(f"{letter}.<image>" for letter in letters)
    )
    said = ask(question, [*used, *candidates], _MOST_CHOICE_TOKENS, 1.0)
    named = re.search(f"(?<![A-Za-z])[{letters}](?![A-Za-z])", said)
    picture = candidates[letters.index(named[0]) if named else 0]
    return Illustration(place, caption, tuple(candidates), picture, named is not None)


def _numbered(lines: Sequence[str]) -> str:
    return "\n".join(f"<Seg{number}>{line}" for number, line in enumerate(lines))


def _plain(text: str) -> str:
    """A text that holds no place for an image."""
    return _PLACEHOLDERS.sub("", text)
