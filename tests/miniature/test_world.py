"""The files of the world: form, splits, balance, determinism."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mono_internvl.errors import ConfigError
from mono_internvl.evaluation.metrics.metric import intersection_over_union
from mono_internvl.miniature import QUICK, WorldFiles, WorldSize, write_world
from mono_internvl.miniature.asking import (
    BalancedAsker,
    further_chart_questions,
    further_questions,
)
from mono_internvl.miniature.drawing import hue_distance, hue_of, unnamed_colour
from mono_internvl.miniature.image_tasks import noisy_caption_record
from mono_internvl.miniature.lexicon import COLOURS, NOVEL_PAIRS, SHAPES, SIZES
from mono_internvl.miniature.pictures import Picture
from mono_internvl.miniature.scenes import Scene, SceneObject, sample_chart, sample_scene
from mono_internvl.miniature.scoring import BENCHMARK

TINY = WorldSize(
    **{
        field.name: max(1, getattr(QUICK, field.name) // 10)
        for field in dataclasses.fields(WorldSize)
        if field.name not in ("s2_scenes", "s2_charts", "unnamed_ratio")
    },
    s2_scenes=600,
    s2_charts=60,
)
STAGES = ("s11", "s12", "s13", "s2")
TEXT_METAS = ("copying", "finding", "language", "practice", "replay")
BALANCED_ANSWERS = {"colour": 6, "shape": 7, "count": 3, "position": 9, "existence": 2, "novel": 5}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def meta_records(world: WorldFiles, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (data set, record) of a meta file."""
    path: Path = getattr(world, name)
    for dataset, entry in json.loads(path.read_text(encoding="utf-8")).items():
        records = read_jsonl(path.parent / entry["annotation"])
        assert len(records) == entry["length"] > 0
        for record in records:
            yield dataset, record


def training_records(world: WorldFiles) -> list[dict[str, Any]]:
    return [r for name in (*STAGES, *TEXT_METAS) for _, r in meta_records(world, name)]


def evaluation(world: WorldFiles) -> list[dict[str, Any]]:
    return read_jsonl(world.heldout)


def said(record: dict[str, Any]) -> str:
    return "\n".join(turn["value"] for turn in record["conversations"])


def signature(record: dict[str, Any]) -> str | None:
    """What a picture's record tells about the whole scene, chart or sign."""
    if record["kind"] in ("ocr", "sentence"):
        return str(record["answer"]).removeprefix("a sign that says ").rstrip(".")
    return json.dumps(record["attributes"]) if "attributes" in record else None


def digest(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_records_have_the_internvl_form(world: WorldFiles) -> None:
    for name in (*STAGES, *TEXT_METAS):
        for _, record in meta_records(world, name):
            turns = record["conversations"]
            assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert all(turn["value"].strip() == turn["value"] != "" for turn in turns)
            assert said(record).count("<image>") == ("image" in record)
            assert turns[0]["value"].startswith("<image>\n") == ("image" in record)


def test_ids_are_unique(world: WorldFiles) -> None:
    for name in (*STAGES, *TEXT_METAS):
        ids = [record["id"] for _, record in meta_records(world, name)]
        assert len(ids) == len(set(ids))
    ids = [record["id"] for record in evaluation(world)]
    assert len(ids) == len(set(ids))


def test_images_exist_and_are_168_px(world: WorldFiles) -> None:
    paths = {
        record["image"]
        for record in [*training_records(world), *evaluation(world)]
        if "image" in record
    }
    for path in sorted(paths)[::17]:
        with Image.open(world.root / path) as image:
            assert (image.size, image.mode, image.format) == ((168, 168), "RGB", "PNG")
    assert all((world.root / path).is_file() for path in paths)


def test_splits_share_no_scene_chart_word_or_picture(world: WorldFiles) -> None:
    parts = {
        "train": training_records(world),
        "validation": read_jsonl(world.validation),
        "heldout": evaluation(world),
    }
    names = list(parts)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            for key in (signature, lambda record: record.get("image")):
                held = [
                    {key(r) for r in parts[name] if r["kind"] != "novel"}
                    for name in (first, second)
                ]
                assert len(held[0] - {None}) > 50
                assert not (held[0] & held[1]) - {None}, (first, second)


def test_heldout_captions_and_words_are_said_nowhere_in_training(world: WorldFiles) -> None:
    train_text = {line for r in training_records(world) for line in said(r).split("\n")}
    train_words = {
        word for line in train_text for word in re.findall(r"\b[A-Z]{3,5}\b|\b\d+\b", line)
    }
    for record in evaluation(world):
        if record["kind"] == "caption":
            assert record["answer"] not in train_text
    signs = {record["answer"] for record in evaluation(world) if record["kind"] == "ocr"}
    assert len(signs) > 30
    assert any(sign.isdigit() for sign in signs)
    assert not signs & train_words


def test_novel_pairs_occur_only_in_their_evaluation(world: WorldFiles) -> None:
    nouns = [f"{colour} {shape}" for colour, shape in NOVEL_PAIRS]
    joined = re.compile(
        "|".join(rf'\b{colour}(?: |", "){shape}\b' for colour, shape in NOVEL_PAIRS)
    )
    others = [r for r in evaluation(world) if r["kind"] != "novel"]
    for record in [*training_records(world), *others, *read_jsonl(world.probes_heldout)]:
        text = said(record) + json.dumps(record.get("attributes", ""))
        assert not joined.search(text), text
    novel = [r["answer"] for r in evaluation(world) if r["kind"] == "novel"]
    assert set(novel) == set(nouns)


def test_captions_leave_out_colours_without_a_name(tmp_path: Path) -> None:
    world = write_world(tmp_path, TINY, seed=0)
    thing = re.compile(rf"a (?:large|small) ({'|'.join(COLOURS)})? ?(?:{'|'.join(SHAPES)})\b")
    ratios: dict[str, float] = {}
    parts = {name: [r for _, r in meta_records(world, name)] for name in ("s12", "s13", "s2")}
    for name, records in {**parts, "heldout": evaluation(world)}.items():
        colours = [colour for record in records for colour in thing.findall(said(record))]
        ratios[name] = colours.count("") / len(colours)
    assert ratios.pop("heldout") == 0.0
    assert 0.0 < ratios.pop("s2") < 0.3  # dialogues name all colours
    assert ratios == pytest.approx({"s12": 0.3, "s13": 0.3}, abs=0.08)


def test_a_colour_without_a_name_is_like_none_that_has_one() -> None:
    rng = random.Random(0)
    named = (0.0, 0.083, 0.143, 0.361, 0.624, 0.787)  # red, orange, yellow, green, blue, purple
    drawn = [unnamed_colour(rng) for _ in range(400)]
    greys = [rgb for rgb in drawn if max(rgb) - min(rgb) < 0.21 * max(rgb)]
    assert 100 < len(greys) < 300
    hues = [hue_of(rgb) for rgb in drawn if rgb not in greys]
    assert all(hue_distance(hue, other) > 0.07 for hue in hues for other in named)
    assert len({int(12 * hue) for hue in hues}) >= 4


def test_heldout_has_every_kind_and_size(world: WorldFiles) -> None:
    counts = Counter(r["kind"] for r in evaluation(world) if not r["aligned"])
    kinds = {*BALANCED_ANSWERS, "naming", "caption", "grounding", "ocr", "chart"}
    assert counts == dict.fromkeys(kinds, QUICK.heldout)
    aligned = Counter(r["kind"] for r in evaluation(world) if r["aligned"])
    assert aligned == dict.fromkeys(("caption", "grounding", "ocr"), QUICK.heldout_aligned)
    assert WorldSize().heldout >= 300


@pytest.mark.parametrize("kind", sorted(BALANCED_ANSWERS))
def test_answers_are_balanced_in_heldout(world: WorldFiles, kind: str) -> None:
    answers = Counter(r["answer"] for r in evaluation(world) if r["kind"] == kind)
    assert len(answers) == BALANCED_ANSWERS[kind]
    assert max(answers.values()) - min(answers.values()) <= 1


def first_turns(world: WorldFiles) -> list[tuple[str, str]]:
    """Question and answer that begin each dialogue of S2 about a scene."""
    records = [r for name, r in meta_records(world, "s2") if name == "dialogues"]
    turns = [[turn["value"] for turn in r["conversations"][:2]] for r in records]
    return [(question.removeprefix("<image>\n"), answer) for question, answer in turns]


def test_first_answers_are_balanced_in_training(world: WorldFiles) -> None:
    forms = {
        "colour": r"what colour is the \w+\?",
        "shape": r"what shape is the \w+ object\?",
        "count": "how many objects are there\?",
        "position": r"where is .*",
        "existence": r"is there .*",
    }
    turns = first_turns(world)
    for kind, form in forms.items():
        answers = Counter(answer for question, answer in turns if re.fullmatch(form, question))
        assert len(answers) == BALANCED_ANSWERS[kind]
        assert max(answers.values()) - min(answers.values()) <= 1


def test_existence_question_text_tells_nothing(world: WorldFiles) -> None:
    answers: dict[str, list[str]] = {}
    for question, answer in first_turns(world):
        if question.startswith("is there"):
            answers.setdefault(question, []).append(answer)
    assert len(answers) > 30
    for asked, given in answers.items():
        assert abs(given.count("yes") - given.count("no")) <= 1, asked


def test_dialogues_ask_for_nothing_that_was_said(world: WorldFiles) -> None:
    records = [r for name, r in meta_records(world, "s2") if name == "dialogues"]
    assert len(records) == QUICK.s2_dialogues
    for record in records:
        turns = [turn["value"] for turn in record["conversations"]]
        assert len(turns) >= 4
        for index in range(1, len(turns), 2):
            answer = turns[index].split()
            before = " ".join(turns[:index]).replace("?", " ").split()
            if answer[0] not in ("yes", "no", "1", "2", "3"):
                assert not set(answer) <= set(before), turns


def test_dialogue_answers_follow_from_the_scene() -> None:
    """An independent reading of the objects gives every answer."""
    rng = random.Random(0)
    for _ in range(400):
        scene = sample_scene(rng, "train")
        for asked in further_questions(scene, rng, 9):
            words = asked.text.rstrip("?").split()
            objects = list(scene.objects)
            if " at the " in asked.text:
                place = asked.text.rstrip("?").split(" at the ")[1]
                objects = [o for o in objects if o.position == place]
            elif words[-1] not in ("this", "there"):
                objects = [o for o in objects if {o.colour, o.shape} & {*words[3:]}]
            answers: dict[str, Any] = {
                "colour": [o.colour for o in objects],
                "shape": [o.shape for o in objects],
                "size": [o.size for o in objects],
            }
            if asked.text.startswith("how many"):
                expected = [str(len(scene.objects))]
            elif asked.text.startswith("is there"):
                subject = {*words[3:]} - {"object"}
                there = any(subject <= {o.colour, o.shape} for o in scene.objects)
                expected = ["yes" if there else "no"]
            elif asked.text.startswith("where"):
                expected = [o.position for o in objects if {o.colour, o.shape} <= {*words}]
            elif asked.text.startswith("what is"):
                expected = [f"{o.colour} {o.shape}" for o in objects]
            else:
                expected = answers[words[1]]
            assert expected == [asked.answer], (scene.caption, asked)


def test_unknown_wordings_of_a_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="wording of 'chart'"):
        BalancedAsker("chart", random.Random(0), ("widest",))


def test_chart_answers_follow_from_the_chart() -> None:
    rng = random.Random(0)
    asker = BalancedAsker("chart", rng)
    for _ in range(200):
        chart, first = asker.ask(lambda: sample_chart(rng, "train"))
        values = dict(chart.bars)
        assert chart.ranking.split()[0] == max(values, key=lambda colour: values[colour])
        asked = [first, *further_chart_questions(chart, rng, 9, first=first)]
        expected = len(chart.bars) if first.form == "value" else 2
        assert len({question.text for question in asked}) == expected
        for question in asked:
            if question.form == "value":
                assert values[question.text.split()[-2]] == int(question.answer)
            else:
                best = max if question.form == "tallest" else min
                assert best(values, key=lambda colour: values[colour]) == question.answer


def test_evaluation_answers_follow_from_the_scene(world: WorldFiles) -> None:
    """An independent reading of the attributes gives the recorded answer."""
    for record in evaluation(world):
        objects = record.get("attributes", [])
        asked = record["conversations"][0]["value"].split("\n")[1].rstrip("?").split()
        nouns = [f"{colour} {shape}" for _, colour, shape, _ in objects]
        kind, answer = record["kind"], record["answer"]
        if kind == "colour":
            assert [o[1] for o in objects if o[2] == asked[-1]] == [answer]
        elif kind == "shape":
            assert [o[2] for o in objects if o[1] == asked[-2]] == [answer]
        elif kind == "count":
            assert len(objects) == int(answer)
        elif kind == "position":
            assert [o[3] for o in objects if f"{o[1]} {o[2]}" == " ".join(asked[-2:])] == [answer]
        elif kind == "existence":
            words = set(asked[3:]) - {"object"}
            assert any(words <= {o[1], o[2]} for o in objects) == (answer == "yes")
        elif kind in ("naming", "novel"):
            assert answer in nouns


def test_every_true_answer_scores_one(world: WorldFiles) -> None:
    for record in [*evaluation(world), *read_jsonl(world.probes_heldout)]:
        assert BENCHMARK.score(record, record["answer"]) == 1.0


def test_boxes_hold_the_drawn_pixels(world: WorldFiles) -> None:
    records = [r for r in evaluation(world) if r["kind"] == "grounding"]
    singles = {
        r["image"]: r["boxes"]
        for r in evaluation(world)
        if r["kind"] == "caption" and len(r["boxes"]) == 1
    }
    checked = 0
    for record in records:
        if record["image"] not in singles:
            continue
        with Image.open(world.root / record["image"]) as image:
            pixels = image.load()
            assert pixels is not None
            corner = pixels[0, 0]
            inked = [
                (x, y)
                for x in range(168)
                for y in range(168)
                if max(abs(a - b) for a, b in zip(pixels[x, y], corner, strict=True)) > 8
            ]
        xs, ys = [x for x, _ in inked], [y for _, y in inked]
        found = [edge * 1000 / 168 for edge in (min(xs), min(ys), max(xs) + 1, max(ys) + 1)]
        assert intersection_over_union(found, record["box"]) > 0.85
        checked += 1
    assert checked >= 5


def test_position_word_is_the_cell_of_the_box(world: WorldFiles) -> None:
    cells = [
        f"{row} {column}".strip()
        for row in ("top", "", "bottom")
        for column in ("left", "", "right")
    ]
    for record in evaluation(world):
        if record["kind"] != "caption":
            continue
        for attributes, (x1, y1, x2, y2) in zip(record["attributes"], record["boxes"], strict=True):
            cell = cells[(y1 + y2) * 3 // 2000 * 3 + (x1 + x2) * 3 // 2000] or "center"
            assert attributes[3] == cell


def test_never_replayed_facts_are_in_no_stage(world: WorldFiles) -> None:
    probes = [r for r in read_jsonl(world.probes_heldout) if r["kind"] == "fact_cloze"]
    hidden = {said(r).split()[0] for r in probes if not r["is_replayed"]}
    replayed = {said(r).split()[0] for r in probes if r["is_replayed"]}
    assert len(hidden) == len(replayed) == 20
    text = " ".join(
        said(r)
        for name in (*STAGES, "replay")
        for _, r in meta_records(world, name)
        if "fact" in r["kind"] or "name" in r["kind"]
    )
    words = set(re.findall(r"\w+", text))
    assert not hidden & words
    assert replayed <= words


def test_noisy_captions_are_noisy_and_clean_ones_true(world: WorldFiles) -> None:
    clean = [r for name, r in meta_records(world, "s12") if name == "captions"]
    assert all(BENCHMARK.score(r, r["answer"]) == 1.0 for r in clean)
    noisy = [set(r["answer"].split()) for _, r in meta_records(world, "s11")]
    assert not any(words & {*COLOURS, *SIZES} for words in noisy)
    assert all(len(words) == 1 and words <= set(SHAPES) for words in noisy)
    rng = random.Random(0)
    thing = SceneObject("small", "red", "moon", "top")
    picture = Picture("a.png", Scene((thing,)), ((0, 0, 1, 1),), False)
    names = [noisy_caption_record(rng, picture)["answer"] for _ in range(2000)]
    assert 0.03 < sum(name != "moon" for name in names) / len(names) < 0.08
    prompts = {r["conversations"][0]["value"] for _, r in meta_records(world, "s11")}
    assert prompts == {"<image>\nprovide a one-sentence caption for the image"}


def test_write_world_same_seed_same_bytes(tmp_path: Path) -> None:
    first = write_world(tmp_path / "a", TINY, seed=3)
    second = write_world(tmp_path / "b", TINY, seed=3)
    other = write_world(tmp_path / "c", TINY, seed=4)
    assert digest(first.root) == digest(second.root)
    assert digest(first.root) != digest(other.root)


def test_write_world_is_idempotent_and_redoes_what_is_half_written(tmp_path: Path) -> None:
    out = tmp_path / "world"
    partial = tmp_path / "world.partial"
    partial.mkdir()
    (partial / "rubbish").write_text("from a killed run")
    write_world(out, TINY)
    assert not partial.exists()
    assert not (out / "rubbish").exists()
    before = (out / "s2.json").stat().st_mtime_ns
    write_world(out, TINY)
    assert (out / "s2.json").stat().st_mtime_ns == before
    write_world(out, TINY, seed=1)
    assert (out / "s2.json").stat().st_mtime_ns != before


def test_write_world_leaves_foreign_files_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not a finished world"):
        write_world(tmp_path, TINY)
    assert (tmp_path / "mine.txt").read_text() == "keep"
