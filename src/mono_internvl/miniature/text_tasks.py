"""Conversations without images: facts, reading, copying, English.

They make the small language model ready for vision: a description in words stands where a picture
will stand later, in the words of the captions, and is followed by the questions that pictures get.
Colours, shapes and places are drawn anew for each record, so only a model that reads its context
can answer; one that does not answers `green triangle` to everything, and no vision stage can repair
it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, TypeAlias

from mono_internvl.miniature.asking import (
    SCENE_KINDS,
    BalancedAsker,
    further_chart_questions,
    further_questions,
)
from mono_internvl.miniature.english import load_english
from mono_internvl.miniature.facts import FACTS, Fact, statements_of
from mono_internvl.miniature.lexicon import (
    COLOURS,
    CONTEXT_NAMES,
    NOVEL_PAIRS,
    SEEN_PAIRS,
    SHAPES,
    TEXT_COLOURS,
    TEXT_NOUNS,
    Split,
    sample_number,
    sample_page,
)
from mono_internvl.miniature.records import Record, make_record
from mono_internvl.miniature.scenes import (
    CAPTION_PROMPT,
    READ_PROMPT,
    Scene,
    sample_chart,
    sample_scene,
)

Turns: TypeAlias = list[tuple[str, str]]
"""(question, answer) pairs of one conversation."""

ENGLISH_PROMPT: Final = "continue the text."
REPEAT_PROMPT: Final = "say it again."
LOOKUP_FORMS: Final = ("number_of", "box", "belonging")
"""Copying tasks that first have to find the right one of several things."""

_TEXT_PAIRS: Final = tuple(
    (colour, noun)
    for colour in COLOURS + TEXT_COLOURS
    for noun in SHAPES + TEXT_NOUNS
    if (colour, noun) not in NOVEL_PAIRS
)
_NUM_FURTHER_QUESTIONS = 2
_FEW: Final = (2, 3)
_MANY: Final = (3, 4, 5, 6)
_WIDE_PAIR_SHARE = 0.35  # of the described scenes: things that no picture shows
_ENGLISH_CHUNK_CHARS = 240


def describe_box(noun: str, box: Sequence[int]) -> str:
    """Return a grounded phrase without control tokens, `red circle[[1, 2, 3, 4]]`."""
    return f"{noun}[[{', '.join(str(value) for value in box)}]]"


def plain_detection_prompt(noun: str) -> str:
    """Return the request for the box of a thing, without control tokens."""
    return f"Detect the {noun} in the image with its bounding box."


def reading_records(
    rng: random.Random,
    split: Split,
    count: int,
    kinds: Sequence[str] = (*SCENE_KINDS, "caption", "chart"),
    is_probe: bool = False,
) -> list[Record]:
    """Make questions about described scenes and charts.

    Args:
        rng: source of chance.
        split: the split of the described things.
        count: how many records.
        kinds: which questions come first, in turn; for these the answers are balanced. Two more
            about the same thing follow.
        is_probe: one question only, the plain description by the caption and only things that
            pictures show, the kind being `reading_qa`.

    Returns:
        The records; `question_kind` says what is asked first.
    """
    askers = {kind: BalancedAsker(kind, rng) for kind in kinds if kind != "caption"}
    num_further = 0 if is_probe else _NUM_FURTHER_QUESTIONS
    records = []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        if kind == "chart":
            chart, question = askers[kind].ask(lambda: sample_chart(rng, split))
            context, text, answer = chart.caption, question.text, question.answer
            further = further_chart_questions(chart, rng, num_further, first=question)
        else:
            if kind == "caption":
                scene = _mixed_scene(rng, split, is_probe)
                text, answer = CAPTION_PROMPT, scene.caption
            else:
                scene, question = askers[kind].ask(lambda: sample_scene(rng, split))
                text, answer = question.text, question.answer
            context = scene.caption if is_probe else describe_scene(rng, scene)
            further = further_questions(scene, rng, num_further, asked=f"{text} {answer}")
        label = "reading_qa" if is_probe else "reading"
        turns = [(f"{context}\n{text}", answer), *((q.text, q.answer) for q in further)]
        records.append(make_record(label, turns, question_kind=kind))
    return records


def _mixed_scene(rng: random.Random, split: Split, is_plain: bool) -> Scene:
    is_wide = not is_plain and rng.random() < _WIDE_PAIR_SHARE
    return sample_scene(rng, split, pairs=_TEXT_PAIRS if is_wide else SEEN_PAIRS)


def describe_scene(rng: random.Random, scene: Scene) -> str:
    """Describe a scene: mostly by its caption, else as a list in any order."""
    if rng.random() < 0.6:
        return scene.caption
    items = [f"{o.position}: {o.size} {o.noun}." for o in scene.objects]
    rng.shuffle(items)
    return " ".join(items)


def open_question_records(rng: random.Random, split: Split, count: int) -> list[Record]:
    """Make questions about things that no picture shows, so that the answer has to be copied.

    Args:
        rng: source of chance.
        split: the split of the described things.
        count: how many records.

    Returns:
        Records of the kind `reading`, with colours and nouns outside the world of pictures.
    """
    records = []
    for _ in range(count):
        scene = sample_scene(rng, split, pairs=_TEXT_PAIRS)
        found = further_questions(scene, rng, 1 + _NUM_FURTHER_QUESTIONS, pairs=_TEXT_PAIRS)
        turns = [(question.text, question.answer) for question in found]
        first_question, first_answer = turns[0]
        turns[0] = (f"{describe_scene(rng, scene)}\n{first_question}", first_answer)
        records.append(make_record("reading", turns))
    return records


def copying_records(
    rng: random.Random,
    split: Split,
    count: int,
    words_only: bool = False,
    is_probe: bool = False,
) -> list[Record]:
    """Make tasks that quote something from the context: a word, a number, a box, a thing.

    Args:
        rng: source of chance.
        split: the split of the words and numbers.
        count: how many records.
        words_only: only the densest task, words without sense.
        is_probe: one question only about each context.

    Returns:
        Records of the kind `copying`, or `lookup` where the right thing has to be found first;
        `form` names the task.
    """
    makers = (
        _copy_sign,
        _copy_words,
        _copy_spelled,
        _copy_number_of,
        _copy_caption,
        _copy_box,
        _copy_belonging,
    )
    records = []
    for index in range(count):
        maker = _copy_words if words_only else makers[index % len(makers)]
        turns = maker(rng, split)
        form = maker.__name__.removeprefix("_copy_")
        kind = "lookup" if form in LOOKUP_FORMS else "copying"
        records.append(make_record(kind, turns[:1] if is_probe else turns, form=form))
    return records


def _copy_sign(rng: random.Random, split: Split) -> Turns:
    page = sample_page(rng, split)
    return [(f"a sign that says {page}.\n{READ_PROMPT}", page)]


def _copy_spelled(rng: random.Random, split: Split) -> Turns:
    page = sample_page(rng, split)
    spelled = "\n".join(" ".join(word) for word in page.split())
    return [(f"{spelled}\n{READ_PROMPT}", page)]


def _copy_words(rng: random.Random, split: Split) -> Turns:
    """Words without sense, so that every one of them has to be looked up: the densest lesson."""
    listed = " ".join(rng.choices(_english_words(), k=rng.randrange(3, 9)))
    return [(f"{listed}.\n{REPEAT_PROMPT}", f"{listed}.")]


@lru_cache(maxsize=1)
def _english_words() -> tuple[str, ...]:
    """Plain words of the English text, without shapes: no unseen pair comes about by chance."""
    words = {word for paragraph in load_english() for word in paragraph.split()}
    return tuple(
        sorted(
            w for w in words if w.isalpha() and w.islower() and 2 < len(w) < 8 and w not in SHAPES
        )
    )


def _copy_caption(rng: random.Random, split: Split) -> Turns:
    caption = sample_scene(rng, split, pairs=_TEXT_PAIRS).caption
    return [(f"{caption}\n{REPEAT_PROMPT}", caption)]


def _copy_number_of(rng: random.Random, split: Split, counts: Sequence[int] = _FEW) -> Turns:
    names = rng.sample(CONTEXT_NAMES, rng.choice(counts))
    numbers = [sample_number(rng, split) for _ in names]
    listed = " ".join(f"{name} has {n}." for name, n in zip(names, numbers, strict=True))
    asked = [(f"what number does {name} have?", n) for name, n in zip(names, numbers, strict=True)]
    return _about(rng, listed, asked)


def _copy_belonging(rng: random.Random, split: Split, counts: Sequence[int] = _FEW) -> Turns:
    names = rng.sample(CONTEXT_NAMES, rng.choice(counts))
    things = [" ".join(pair) for pair in rng.sample(_TEXT_PAIRS, len(names))]
    articles = ["an" if thing[0] in "aeiou" else "a" for thing in things]
    owned = zip(names, articles, things, strict=True)
    listed = " ".join(f"{name} has {article} {thing}." for name, article, thing in owned)
    asked = [
        (f"what does {name} have?", thing)
        if rng.random() < 0.5
        else (f"who has the {thing}?", name)
        for name, thing in zip(names, things, strict=True)
    ]
    return _about(rng, listed, asked)


def _copy_box(rng: random.Random, split: Split) -> Turns:
    scene = sample_scene(rng, split)
    asked = []
    for thing in scene.objects:
        left, top = rng.randrange(0, 800), rng.randrange(0, 800)
        box = (left, top, left + rng.randrange(100, 200), top + rng.randrange(100, 200))
        asked.append((plain_detection_prompt(thing.noun), describe_box(thing.noun, box)))
    listed = ". ".join(phrase for _, phrase in asked)
    return _about(rng, f"{listed}.", asked)


def lookup_records(
    rng: random.Random, split: Split, count: int, num_things: Sequence[int] = _MANY
) -> list[Record]:
    """Make the densest lesson in finding: many things in one context, every one asked for.

    Args:
        rng: source of chance.
        split: the split of what is told.
        count: how many records.
        num_things: how many things are in a context, each number as likely.

    Returns:
        Records of the kind `lookup`; `form` names the task.
    """
    makers = (_copy_number_of, _copy_belonging, _find_places, _find_bars)
    records = []
    for index in range(count):
        maker = makers[index % len(makers)]
        form = maker.__name__.removeprefix("_copy_").removeprefix("_find_")
        records.append(make_record("lookup", maker(rng, split, num_things), form=form))
    return records


def _find_places(rng: random.Random, split: Split, counts: Sequence[int]) -> Turns:
    scene = sample_scene(rng, split, pairs=_TEXT_PAIRS, num_objects=rng.choice(counts))
    asked = [
        (f"where is the {thing.noun}?", thing.position)
        if rng.random() < 0.5
        else (f"what is at the {thing.position}?", thing.noun)
        for thing in scene.objects
    ]
    return _about(rng, describe_scene(rng, scene), asked)


def _find_bars(rng: random.Random, split: Split, counts: Sequence[int]) -> Turns:
    chart = sample_chart(rng, split)
    asked = [
        (f"what is the value of the {colour} bar?", str(value)) for colour, value in chart.bars
    ]
    return _about(rng, chart.caption, asked)


def _about(rng: random.Random, context: str, asked: Turns) -> Turns:
    """All the questions in any order, the context in front of the first."""
    rng.shuffle(asked)
    question, answer = asked[0]
    return [(f"{context}\n{question}", answer), *asked[1:]]


def fact_records(facts: Sequence[Fact]) -> list[Record]:
    """Make all records about some facts: question, cloze, and what is known about the person.

    Args:
        facts: the facts.

    Returns:
        Records of the kinds `name_qa`, `fact_cloze` and `fact_statement`.
    """
    records = []
    for fact in facts:
        records.append(make_record("name_qa", [(fact.question, fact.value)]))
        records.append(make_record("fact_cloze", [(f"{fact.cloze} ...", fact.value)]))
    for name in dict.fromkeys(fact.name for fact in facts):
        turn = (f"tell me about {name}.", statements_of(name))
        records.append(make_record("fact_statement", [turn]))
    return records


def english_records(paragraphs: Sequence[str]) -> list[Record]:
    """Make records of plain English, long paragraphs cut at a word.

    Args:
        paragraphs: the prose.

    Returns:
        Records of the kind `english`, each answer at most a few hundred characters.
    """
    return [
        make_record("english", [(ENGLISH_PROMPT, chunk)])
        for paragraph in paragraphs
        for chunk in _chunks(paragraph)
    ]


def _chunks(paragraph: str) -> list[str]:
    chunks: list[str] = []
    current = ""
    for word in paragraph.split():
        if current and len(current) + 1 + len(word) > _ENGLISH_CHUNK_CHARS:
            chunks.append(current)
            current = word
        else:
            current = f"{current} {word}" if current else word
    chunks.append(current)
    return chunks


def name_qa_probes() -> list[Record]:
    """Return one question for every fact: does the model answer from what it knows?"""
    return [
        make_record("name_qa", [(fact.question, fact.value)], is_replayed=fact.is_replayed)
        for fact in FACTS
    ]


def cloze_probes() -> list[Record]:
    """Return one unfinished statement for every fact; `is_replayed` tells the two halves apart."""
    return [
        make_record("fact_cloze", [(f"{fact.cloze} ...", fact.value)], is_replayed=fact.is_replayed)
        for fact in FACTS
    ]


def text_probes(
    seed: int = 0, split: Split = "heldout", count: int = 300
) -> dict[str, list[Record]]:
    """Make the text skills by which a language model is judged before (and after) vision.

    Args:
        seed: seed of the drawn ones.
        split: the split of the described things.
        count: how many records for reading and for copying; questions about facts are all asked.

    Returns:
        Records under `name_qa`, `fact_cloze`, `reading_qa` and `copying` (with those of the kind
        `lookup`); score by exact match.
    """
    rng = random.Random(f"{seed}/text probes/{split}")
    kinds = (*SCENE_KINDS, "chart")
    return {
        "name_qa": name_qa_probes(),
        "fact_cloze": cloze_probes(),
        "reading_qa": reading_records(rng, split, count, kinds, is_probe=True),
        "copying": copying_records(rng, split, count, is_probe=True),
    }
