"""Conversations about pictures: captions, detection, reading, questions, dialogues."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

from mono_internvl.miniature.asking import SCENE_KINDS, BalancedAsker
from mono_internvl.miniature.drawing import Box
from mono_internvl.miniature.lexicon import (
    COLOURS,
    NOVEL_PAIRS,
    POSITIONS,
    SHAPES,
    SIZES,
    sample_word,
)
from mono_internvl.miniature.pictures import Content, Picture
from mono_internvl.miniature.records import Record, make_record
from mono_internvl.miniature.scenes import CAPTION_PROMPT, READ_PROMPT, Chart, Question, Scene
from mono_internvl.miniature.text_tasks import dialogue_turns

_JUNK: Final = (
    "jpg",
    "image",
    "photo of",
    "hd",
    "free",
    "stock",
    "click here",
    "new",
    "my",
    "nice",
)
_JUNK_SHARE = 0.3
_WRONG_SHARE = 0.06  # of the attributes in a noisy caption
_KEPT_SHARE = {"size": 0.5, "colour": 0.85, "position": 0.6}
_DROPPED_OBJECT_SHARE = 0.15


def detection_prompt(noun: str) -> str:
    """Return the request for the box of a thing."""
    return f"Detect the <ref>{noun}</ref> in the image with its bounding box."


def grounded(noun: str, box: Box) -> str:
    """Return a grounded phrase, `<ref>red circle</ref><box>[[x1, y1, x2, y2]]</box>`."""
    return f"<ref>{noun}</ref><box>[[{', '.join(str(edge) for edge in box)}]]</box>"


def caption_of(content: Scene | Chart | str) -> str:
    """Return the true sentence about whatever a picture shows."""
    return f"a sign that says {content}." if isinstance(content, str) else content.caption


def caption_record(picture: Picture[Scene] | Picture[Chart] | Picture[str]) -> Record:
    """Make the clean caption of a picture; a scene's record holds its attributes for scoring."""
    content = picture.content
    extra: dict[str, object] = {"aligned": picture.is_aligned}
    kind = "sentence"
    if isinstance(content, Scene):
        kind = "caption"
        extra["attributes"] = content.attributes
        extra["boxes"] = picture.boxes
    return make_record(kind, [(CAPTION_PROMPT, caption_of(content))], picture.path, **extra)


def noisy_caption_record(
    rng: random.Random, picture: Picture[Scene] | Picture[Chart] | Picture[str]
) -> Record:
    """Make a caption as the web has them: terse, with junk, attributes missing or wrong."""
    content = picture.content
    if isinstance(content, Scene):
        text = _noisy_scene(rng, content)
    elif isinstance(content, Chart):
        shown = rng.sample(content.bars, rng.randint(1, len(content.bars)))
        text = "bar chart " + " ".join(f"{colour} {value}" for colour, value in shown)
    else:
        sign = sample_word(rng, "train") if rng.random() < _WRONG_SHARE else content
        text = rng.choice((f"sign {sign}", f"text {sign}", sign))
    if rng.random() < _JUNK_SHARE:
        junk = rng.choice(_JUNK)
        text = f"{junk} {text}" if rng.random() < 0.5 else f"{text} {junk}"
    return make_record("noisy_caption", [(CAPTION_PROMPT, text)], picture.path)


def _noisy_scene(rng: random.Random, scene: Scene) -> str:
    parts = []
    objects = list(scene.objects)
    if len(objects) > 1 and rng.random() < _DROPPED_OBJECT_SHARE:
        objects.pop(rng.randrange(len(objects)))
    for thing in objects:
        size = _perhaps_wrong(rng, thing.size, SIZES)
        colour = _perhaps_wrong(rng, thing.colour, COLOURS)
        shape = _perhaps_wrong(rng, thing.shape, SHAPES)
        if (colour, shape) in NOVEL_PAIRS:
            colour, shape = thing.colour, thing.shape
        words = [size] if rng.random() < _KEPT_SHARE["size"] else []
        words += [colour] if rng.random() < _KEPT_SHARE["colour"] else []
        words.append(shape)
        if rng.random() < _KEPT_SHARE["position"]:
            words.append(_perhaps_wrong(rng, thing.position, POSITIONS))
        parts.append(" ".join(words))
    return rng.choice((" and ", ", ")).join(parts)


def _perhaps_wrong(rng: random.Random, word: str, words: Sequence[str]) -> str:
    return rng.choice(words) if rng.random() < _WRONG_SHARE else word


def detection_record(picture: Picture[Scene], index: int) -> Record:
    """Make the request for the box of one object of a scene.

    Args:
        picture: the picture.
        index: which of its objects.

    Returns:
        A record of the kind `grounding` with the true `box`.
    """
    noun, box = picture.content.objects[index].noun, picture.boxes[index]
    turns = [(detection_prompt(noun), grounded(noun, box))]
    return make_record("grounding", turns, picture.path, box=box, aligned=picture.is_aligned)


def reading_record(picture: Picture[str]) -> Record:
    """Make the request to read a sign; a record of the kind `ocr`."""
    turns = [(READ_PROMPT, picture.content)]
    return make_record("ocr", turns, picture.path, aligned=picture.is_aligned)


def question_record(
    picture: Picture[Scene] | Picture[Chart], question: Question, kind: str | None = None
) -> Record:
    """Make a record of a question about a picture.

    Args:
        picture: the picture.
        question: the question.
        kind: another name for the kind, or None for the question's own.

    Returns:
        The record, with the wording's name under `form`.
    """
    extra: dict[str, object] = {"form": question.form, "aligned": picture.is_aligned}
    if isinstance(picture.content, Scene):
        extra["boxes"] = picture.boxes
        extra["attributes"] = picture.content.attributes
    turns = [(question.text, question.answer)]
    return make_record(kind or question.kind, turns, picture.path, **extra)


def detection_records(
    rng: random.Random, pictures: Sequence[Picture[Scene]], count: int
) -> list[Record]:
    """Make detection records for random objects of random pictures."""
    chosen = (rng.choice(pictures) for _ in range(count))
    return [detection_record(p, rng.randrange(len(p.content.objects))) for p in chosen]


def question_records(
    rng: random.Random, pictures: Sequence[Picture[Scene]], count: int
) -> list[Record]:
    """Make balanced questions about scenes, all kinds in turn.

    Args:
        rng: source of chance.
        pictures: the pictures; many questions may share one.
        count: how many records.

    Returns:
        The records.
    """
    by_scene = _by_content(pictures)
    scenes = [picture.content for picture in pictures]
    askers = [BalancedAsker(kind, rng) for kind in SCENE_KINDS]
    records = []
    for index in range(count):
        scene, question = askers[index % len(askers)].ask(lambda: rng.choice(scenes))
        records.append(question_record(rng.choice(by_scene[scene]), question))
    return records


def _by_content(pictures: Sequence[Picture[Content]]) -> dict[Content, list[Picture[Content]]]:
    grouped: dict[Content, list[Picture[Content]]] = {}
    for picture in pictures:
        grouped.setdefault(picture.content, []).append(picture)
    return grouped


def chart_question_records(
    rng: random.Random, pictures: Sequence[Picture[Chart]], count: int
) -> list[Record]:
    """Make balanced questions about charts."""
    by_chart = _by_content(pictures)
    charts = [picture.content for picture in pictures]
    asker = BalancedAsker("chart", rng)
    records = []
    for _ in range(count):
        chart, question = asker.ask(lambda: rng.choice(charts))
        records.append(question_record(rng.choice(by_chart[chart]), question))
    return records


def dialogue_records(
    rng: random.Random, pictures: Sequence[Picture[Scene]], count: int
) -> list[Record]:
    """Make dialogues of two or three turns, some with a detection at the end.

    Args:
        rng: source of chance.
        pictures: the pictures.
        count: how many records.

    Returns:
        Records of the kind `dialogue`.
    """
    records = []
    for _ in range(count):
        picture = rng.choice(pictures)
        turns = dialogue_turns(rng, picture.content)
        if rng.random() < 1 / 3:
            index = rng.randrange(len(picture.boxes))
            noun = picture.content.objects[index].noun
            turns[-1] = (detection_prompt(noun), grounded(noun, picture.boxes[index]))
        records.append(make_record("dialogue", turns, picture.path))
    return records
