"""What each stage of the miniature is trained on, and what it is tested on: lists of records."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mono_internvl.miniature.asking import SCENE_KINDS, BalancedAsker
from mono_internvl.miniature.english import load_english
from mono_internvl.miniature.facts import FACTS, facts_of
from mono_internvl.miniature.image_tasks import (
    boxes_record,
    caption_record,
    captioned_boxes_record,
    chart_question_records,
    detection_record,
    noisy_caption_record,
    question_record,
    question_records,
    ranked_bars_record,
    reading_record,
)
from mono_internvl.miniature.lexicon import NOVEL_PAIRS, Split, sample_sign
from mono_internvl.miniature.pictures import Album, Picture
from mono_internvl.miniature.records import Dataset, Record
from mono_internvl.miniature.scenes import Chart, Question, Scene, sample_chart, sample_scene
from mono_internvl.miniature.text_tasks import (
    copying_records,
    english_records,
    fact_records,
    lookup_records,
    open_question_records,
    reading_records,
)

_FACTS_REPEATED = 40
_ENGLISH_REPEATED = 2
_COPYING_REPEATED = 2
_REPLAYED_FACTS_REPEATED = 10
_UNNAMED_RATIO_OF_NAMES = 0.5  # in S1.1, where only the shape is said
_NOVEL = tuple(sorted(NOVEL_PAIRS))


@dataclass(frozen=True)
class WorldSize:
    """How much of everything there is.

    Attributes:
        reading: questions about described scenes and charts, for the language model.
        open_questions: questions about described things that no picture shows.
        copying: tasks that quote from the context.
        lookups: contexts of many things, each of them asked for; for the second lesson, too.
        english: plain-English records, at most.
        text_probes: drawn records of each text skill, for each split.
        s11_things: pictures of a single thing for S1.1.
        s12_scenes: pictures of shapes for S1.2; likewise signs and charts, and those of the later
            stages. Every stage draws new ones.
        s2_dialogues: dialogues about the scenes of S2; likewise about its charts.
        s2_captions: further scenes of S2 that are captioned; s2_detection: likewise, with boxes.
        replay_reading: described scenes repeated in S2; likewise copying and English.
        heldout: held-out records of each kind.
        heldout_aligned: further held-out captions, boxes and signs without jitter.
        validation: validation records of each kind.
        unnamed_ratio: of the things that S1.2 to S2 describe, those whose colour has no name: a
            shape that is known may have another colour, too.
    """

    reading: int = 40_000
    open_questions: int = 6_000
    copying: int = 10_000
    lookups: int = 10_000
    english: int = 100_000
    text_probes: int = 300
    s11_things: int = 4_800
    s12_scenes: int = 8_800
    s12_signs: int = 4_000
    s12_charts: int = 3_000
    s13_scenes: int = 5_600
    s13_signs: int = 6_600
    s13_charts: int = 1_800
    s2_scenes: int = 5_500
    s2_signs: int = 1_200
    s2_charts: int = 4_000
    s2_dialogues: int = 5_000
    s2_chart_dialogues: int = 5_200
    s2_captions: int = 4_600
    s2_detection: int = 5_400
    replay_reading: int = 400
    replay_copying: int = 150
    replay_english: int = 1_700
    heldout: int = 300
    heldout_aligned: int = 100
    validation: int = 100
    unnamed_ratio: float = 0.3


def language_datasets(size: WorldSize, seed: int) -> list[Dataset]:
    """Make the text-only conversations that the language model is trained on.

    Args:
        size: how many.
        seed: seed of the draws.

    Returns:
        The data sets reading, open_questions, copying, lookups, facts (all of them) and english.
    """
    rng = random.Random(f"{seed}/language")
    return [
        Dataset("reading", reading_records(rng, "train", size.reading)),
        Dataset("open_questions", open_question_records(rng, "train", size.open_questions)),
        Dataset("copying", copying_records(rng, "train", size.copying), _COPYING_REPEATED),
        Dataset("lookups", lookup_records(rng, "train", size.lookups)),
        Dataset("facts", fact_records(FACTS), repeat_time=_FACTS_REPEATED),
        Dataset("english", english_records(load_english())[: size.english], _ENGLISH_REPEATED),
    ]


def first_lesson(size: WorldSize, seed: int) -> list[Dataset]:
    """Make what the language model learns first: to look things up in its context.

    Words without sense, to be said again. Mixed with anything else, even with other copying, this
    takes a small model several thousand steps; by itself, four hundred.

    Args:
        size: how many.
        seed: seed of the draws.

    Returns:
        The data set words.
    """
    rng = random.Random(f"{seed}/first lesson")
    return [Dataset("words", copying_records(rng, "train", size.copying, words_only=True))]


def second_lesson(size: WorldSize, seed: int) -> list[Dataset]:
    """Make what the language model learns second: to find one of many things in its context.

    Args:
        size: how many.
        seed: seed of the draws.

    Returns:
        The data sets lookups and, a fifth of all, words.
    """
    rng = random.Random(f"{seed}/second lesson")
    return [
        Dataset("lookups", lookup_records(rng, "train", 2 * size.lookups)),
        Dataset("words", copying_records(rng, "train", size.lookups // 2, words_only=True)),
    ]


def last_lesson(size: WorldSize, seed: int) -> list[Dataset]:
    """Make what the language model practises last: quoting above all, and some of everything.

    Args:
        size: how many.
        seed: seed of the draws.

    Returns:
        The data sets copying, lookups of a few things, reading, facts and english.
    """
    rng = random.Random(f"{seed}/last lesson")
    num_lookups, num_reading = size.lookups * 4 // 5, size.reading // 4
    return [
        Dataset("copying", copying_records(rng, "train", size.copying * 8 // 5)),
        Dataset("lookups", lookup_records(rng, "train", num_lookups, num_things=(2, 3, 4))),
        Dataset("reading", reading_records(rng, "train", num_reading)),
        Dataset("facts", fact_records(FACTS), repeat_time=_FACTS_REPEATED // 4),
        Dataset("english", english_records(load_english())[: size.english]),
    ]


@dataclass(frozen=True)
class ImageStages:
    """The data sets of the four stages with pictures.

    Attributes:
        s11: noisy captions: names of single things, whatever their colour.
        s12: clean captions.
        s13: captions, detection and reading.
        s2: questions and dialogues, some of everything before, and text.
    """

    s11: list[Dataset]
    s12: list[Dataset]
    s13: list[Dataset]
    s2: list[Dataset]


def replay_datasets(size: WorldSize, seed: int) -> list[Dataset]:
    """Make the text that is repeated while vision is learnt.

    Args:
        size: how many.
        seed: seed of the draws.

    Returns:
        The data sets text_facts (only the facts that are replayed), text_reading, text_copying and
        text_english.
    """
    rng = random.Random(f"{seed}/replay")
    reading = reading_records(rng, "train", size.replay_reading * 3 // 4)
    reading += open_question_records(rng, "train", size.replay_reading - len(reading))
    return [
        Dataset("text_facts", fact_records(facts_of(True)), _REPLAYED_FACTS_REPEATED),
        Dataset("text_reading", reading),
        Dataset("text_copying", copying_records(rng, "train", size.replay_copying)),
        Dataset("text_english", english_records(load_english())[: size.replay_english]),
    ]


def image_stages(root: Path, size: WorldSize, seed: int) -> ImageStages:
    """Draw the training pictures and make the records of all four stages.

    Args:
        root: the data root.
        size: how many.
        seed: seed of the draws.

    Returns:
        The data sets.
    """
    rng = random.Random(f"{seed}/images")
    album = Album(root, "s11", rng)
    things = album.scenes("train", size.s11_things, _UNNAMED_RATIO_OF_NAMES, num_objects=1)
    s11 = [Dataset("captions_noisy", [noisy_caption_record(rng, thing) for thing in things])]

    album = Album(root, "s12", rng)
    s12 = [
        _captions("captions", album.scenes("train", size.s12_scenes, size.unnamed_ratio)),
        _captions("captions_signs", album.pages("train", size.s12_signs)),
        _captions("captions_charts", album.charts("train", size.s12_charts)),
    ]

    album = Album(root, "s13", rng)
    scenes = album.scenes("train", size.s13_scenes, size.unnamed_ratio)
    s13 = [
        Dataset("detection", [captioned_boxes_record(rng, picture) for picture in scenes]),
        Dataset("ocr", [reading_record(p) for p in album.pages("train", size.s13_signs)]),
        Dataset(
            "charts", [ranked_bars_record(rng, p) for p in album.charts("train", size.s13_charts)]
        ),
    ]

    album = Album(root, "s2", rng)
    scenes = album.scenes("train", size.s2_scenes)
    charts = album.charts("train", size.s2_charts)
    signs = album.pages("train", size.s2_signs)
    count = max(size.s2_captions, size.s2_detection)
    described = album.scenes("train", count, size.unnamed_ratio)
    s2 = [
        Dataset("dialogues", question_records(rng, scenes, size.s2_dialogues)),
        Dataset("chart_dialogues", chart_question_records(rng, charts, size.s2_chart_dialogues)),
        _captions("captions", described[: size.s2_captions]),
        Dataset("detection", [boxes_record(rng, p) for p in described[-size.s2_detection :]]),
        Dataset("ocr", [reading_record(picture) for picture in signs]),
        *replay_datasets(size, seed),
    ]
    return ImageStages(s11, s12, s13, s2)


def _captions(
    name: str, pictures: Sequence[Picture[Scene] | Picture[Chart] | Picture[str]]
) -> Dataset:
    return Dataset(name, [caption_record(picture) for picture in pictures])


def evaluation_records(
    root: Path, split: Split, count: int, count_aligned: int, seed: int
) -> list[Record]:
    """Draw the pictures of a split that is not trained on and make its records.

    Args:
        root: the data root.
        split: `validation` or `heldout`.
        count: records of each kind: caption, the kinds of questions, chart, novel, grounding, ocr.
        count_aligned: further captions, boxes and signs whose record says `aligned`.
        seed: seed of the draws.

    Returns:
        The records. The kind `novel` names single things whose colour and shape no training record
        puts together; held-out takes all of them but those that validation takes.
    """
    rng = random.Random(f"{seed}/evaluation/{split}")
    album = Album(root, split, rng)
    records: list[Record] = []
    for index in range(count + count_aligned):
        is_aligned = index >= count
        picture = album.scene(sample_scene(rng, split), is_aligned)
        sign = album.sign(sample_sign(rng, split), is_aligned)
        records.append(caption_record(picture))
        records.append(detection_record(picture, rng.randrange(len(picture.boxes))))
        records.append(reading_record(sign))
    for kind in SCENE_KINDS:
        asker = BalancedAsker(kind, rng)
        for _ in range(count):
            scene, question = asker.ask(lambda: sample_scene(rng, split))
            records.append(question_record(album.scene(scene), question))
    asker = BalancedAsker("chart", rng)
    for _ in range(count):
        chart, question = asker.ask(lambda: sample_chart(rng, split))
        records.append(question_record(album.chart(chart), question))
    for index in range(count):
        scene = _novel_scene(rng, split, _NOVEL[index % len(_NOVEL)])
        question = Question("novel", "this", "what is this?", scene.objects[0].noun)
        records.append(question_record(album.scene(scene), question))
    return records


def _novel_scene(rng: random.Random, split: Split, pair: tuple[str, str]) -> Scene:
    options: tuple[Split, ...] = ("validation",) if split == "validation" else ("train", "heldout")
    weights = [14, 2] if len(options) == 2 else [1]
    chosen = rng.choices(options, weights)[0]
    return sample_scene(rng, chosen, pairs=(pair,), num_objects=1)
