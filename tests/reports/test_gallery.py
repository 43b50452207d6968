"""The gallery shows every kind, errors in proportion, and the same samples for the same run."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mono_internvl.reports.gallery import (
    PARTLY,
    RIGHT,
    WRONG,
    choose,
    load_picture,
    make_gallery,
    verdict_on,
)
from mono_internvl.reports.kinds import Kind, Words
from mono_internvl.runs.predictions import Answer

WORDS = Words(
    kinds=(
        Kind("caption", "Caption", "words", is_graded=True),
        Kind("grounding", "Grounding", "overlap", full_marks=0.5),
        Kind("ocr", "Reading", "letters", is_graded=True),
    )
)


def _answer(kind: str, index: int, score: float) -> Answer:
    return Answer(f"{kind}-{index}", kind, f"{index}.png", "what?", "truth", "text", score)


def _answers(kind: str, num_right: int, num_wrong: int) -> list[Answer]:
    scores = [1.0] * num_right + [0.0] * num_wrong
    return [_answer(kind, index, score) for index, score in enumerate(scores)]


def test_choose_shows_errors_that_rounding_by_kind_would_hide() -> None:
    kinds = ("colour", "shape", "count", "position", "existence", "naming", "novel", "chart")
    answers = [answer for kind in kinds for answer in _answers(kind, 85, 15)]
    chosen = choose(answers, 24, WORDS)
    assert Counter(answer.kind for answer in chosen) == dict.fromkeys(kinds, 3)
    assert sum(verdict_on(answer, WORDS) == WRONG for answer in chosen) == 4  # 15 % of 24 is 3.6


@pytest.mark.parametrize("num_wrong", [0, 3, 10])
def test_choose_is_exact_at_the_ends_and_between(num_wrong: int) -> None:
    chosen = choose(_answers("colour", 10 - num_wrong, num_wrong), 10, WORDS)
    assert sum(verdict_on(answer, WORDS) == WRONG for answer in chosen) == num_wrong


def test_choose_does_not_depend_on_the_order_of_the_file() -> None:
    answers = _answers("colour", 30, 20) + _answers("shape", 10, 40)
    shuffled = random.Random(0).sample(answers, len(answers))
    assert choose(shuffled, 12, WORDS) == choose(answers, 12, WORDS)


def test_choose_fills_up_from_larger_kinds() -> None:
    chosen = choose(_answers("colour", 1, 0) + _answers("shape", 50, 0), 8, WORDS)
    assert Counter(answer.kind for answer in chosen) == {"colour": 1, "shape": 7}
    assert choose([], 8, WORDS) == []


def test_choose_repeats_no_answer() -> None:
    chosen = choose(_answers("ocr", 3, 20), 20, WORDS)
    assert len({answer.id for answer in chosen}) == 20


@pytest.mark.parametrize(
    ("kind", "score", "verdict"),
    [
        ("colour", 1.0, RIGHT),
        ("colour", 0.0, WRONG),
        ("caption", 0.75, PARTLY),
        ("ocr", 0.0, WRONG),
        ("grounding", 0.5, RIGHT),
        ("grounding", 0.49, WRONG),
        ("a kind of the user", 1.0, RIGHT),
    ],
)
def test_verdict_follows_the_kind(kind: str, score: float, verdict: str) -> None:
    assert verdict_on(_answer(kind, 0, score), WORDS) == verdict


def test_gallery_states_the_share_over_all_answers(tmp_path: Path) -> None:
    gallery = make_gallery(_answers("colour", 30, 10), tmp_path, 8, WORDS)
    assert gallery.num_answers == 40
    assert gallery.right_share == pytest.approx(0.75)
    assert gallery.counts == {RIGHT: 6, WRONG: 2}


def test_load_picture_makes_large_images_small(tmp_path: Path) -> None:
    Image.effect_noise((1200, 600), 90).save(tmp_path / "photo.png")
    picture = load_picture(tmp_path, "photo.png")
    assert picture is not None
    assert (picture.width_px, picture.height_px) == (448, 224)
    assert picture.uri.startswith("data:image/jpeg;base64,")
    assert len(picture.uri) < 100_000


def test_load_picture_reads_only_images_below_the_data_root(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    (root / "broken.png").write_bytes(b"not an image")
    assert load_picture(root, "../outside.png") is None
    assert load_picture(root, "broken.png") is None
    assert load_picture(root, "absent.png") is None
