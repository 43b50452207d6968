"""Conversations about pictures: captions, detection, reading, questions, dialogues."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mono_internvl.miniature.asking import (
    SCENE_KINDS,
    BalancedAsker,
    further_chart_questions,
    further_questions,
)
from mono_internvl.miniature.drawing import Box
from mono_internvl.miniature.lexicon import SHAPES
from mono_internvl.miniature.pictures import Content, Picture
from mono_internvl.miniature.records import Record, make_record
from mono_internvl.miniature.scenes import (
    CAPTION_PROMPT,
    RANK_PROMPT,
    READ_PROMPT,
    Chart,
    Question,
    Scene,
)
from mono_internvl.miniature.text_tasks import describe_box, plain_detection_prompt

_WRONG_SHARE = 0.06  # of the noisy captions


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


def noisy_caption_record(rng: random.Random, picture: Picture[Scene]) -> Record:
    """Name the one thing in a picture, as tersely as the web does, and now and then wrongly.

    No words of chance around it: with them, 500 steps taught .23 of the shapes instead of .70.
    """
    (thing,) = picture.content.objects
    name = rng.choice(SHAPES) if rng.random() < _WRONG_SHARE else thing.shape
    return make_record("noisy_caption", [(CAPTION_PROMPT, name)], picture.path)


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


def boxes_record(rng: random.Random, picture: Picture[Scene]) -> Record:
    """Make a dialogue that asks for the boxes of all things in a picture, in any order."""
    turns = [
        (detection_prompt(thing.noun), grounded(thing.noun, coarse(box)))
        for thing, box in zip(picture.content.objects, picture.boxes, strict=True)
    ]
    return make_record("grounding", rng.sample(turns, len(turns)), picture.path)


def captioned_boxes_record(rng: random.Random, picture: Picture[Scene]) -> Record:
    """Make a dialogue that asks for the caption and all boxes of a picture, in any order.

    Boxes are written without control tokens, whose rows are learnt in instruction tuning only.
    """
    turns = [
        (plain_detection_prompt(thing.noun), describe_box(thing.noun, coarse(box)))
        for thing, box in zip(picture.content.objects, picture.boxes, strict=True)
    ]
    turns.append((CAPTION_PROMPT, picture.content.caption))
    return make_record("grounding", rng.sample(turns, len(turns)), picture.path)


def coarse(box: Box) -> Box:
    """Round a box to hundredths: a finer edge is less than a pixel of the miniature's pictures."""
    left, top, right, bottom = (min(10 * round(edge / 10), 990) for edge in box)
    return left, top, right, bottom


def question_records(
    rng: random.Random, pictures: Sequence[Picture[Scene]], count: int
) -> list[Record]:
    """Make dialogues about scenes, the kinds of the first question balanced and in turn.

    Args:
        rng: source of chance.
        pictures: the pictures; many dialogues may share one.
        count: how many records.

    Returns:
        The records; two or three more questions follow the first.
    """
    by_scene = _by_content(pictures)
    scenes = [picture.content for picture in pictures]
    askers = [BalancedAsker(kind, rng) for kind in SCENE_KINDS]
    records = []
    for index in range(count):
        scene, first = askers[index % len(askers)].ask(lambda: rng.choice(scenes))
        said = f"{first.text} {first.answer}"
        asked = [first, *further_questions(scene, rng, rng.choice((2, 3)), asked=said)]
        records.append(_dialogue(rng.choice(by_scene[scene]), asked))
    return records


def _dialogue(picture: Picture[Scene] | Picture[Chart], asked: Sequence[Question]) -> Record:
    turns = [(question.text, question.answer) for question in asked]
    return make_record("dialogue", turns, picture.path)


def ranked_bars_record(rng: random.Random, picture: Picture[Chart]) -> Record:
    """Make a dialogue that asks for a chart's caption and for its bars by height, in any order.

    The caption goes from left to right; to say the bars by height each has to be found and read.
    """
    chart = picture.content
    turns = [(CAPTION_PROMPT, chart.caption), (RANK_PROMPT, chart.ranking)]
    return make_record("sentence", rng.sample(turns, len(turns)), picture.path)


def _by_content(pictures: Sequence[Picture[Content]]) -> dict[Content, list[Picture[Content]]]:
    grouped: dict[Content, list[Picture[Content]]] = {}
    for picture in pictures:
        grouped.setdefault(picture.content, []).append(picture)
    return grouped


def chart_question_records(
    rng: random.Random, pictures: Sequence[Picture[Chart]], count: int
) -> list[Record]:
    """Make dialogues about charts: comparisons and values by turns, the first question balanced."""
    by_chart = _by_content(pictures)
    charts = [picture.content for picture in pictures]
    askers = [BalancedAsker("chart", rng, forms) for forms in (("tallest", "shortest"), ("value",))]
    records = []
    for index in range(count):
        chart, first = askers[index % len(askers)].ask(lambda: rng.choice(charts))
        asked = [first, *further_chart_questions(chart, rng, 3, first=first)]
        records.append(_dialogue(rng.choice(by_chart[chart]), asked))
    return records
