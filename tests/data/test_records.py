"""Raw records to records: turns, roles, images and their placeholders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mono_internvl.data.records import Record
from mono_internvl.data.sources import FileImage, JsonlSource
from mono_internvl.errors import SampleError
from mono_internvl.processing.prompts import ImagePart

HUMAN, GPT = {"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}
SYSTEM = {"from": "system", "value": "be brief"}


def _human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def _read(folder: Path, **record: Any) -> Record:
    for name in ("a.png", "b.png"):
        (folder / name).touch()
    file = folder / "data.jsonl"
    file.write_text("\n" + json.dumps(record))
    return JsonlSource(file, folder, max_tiles=3).record(0)


def test_text_record_keeps_turns_and_roles(tmp_path: Path) -> None:
    record = _read(tmp_path, id=7, conversations=[SYSTEM, HUMAN, GPT, HUMAN, GPT])
    assert [turn.role for turn in record.turns] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    assert [turn.text for turn in record.turns] == ["be brief", "what?", "that", "what?", "that"]
    assert (record.images, record.record_id, record.max_tiles) == ((), "7", 3)
    assert record.where == f"{tmp_path / 'data.jsonl'}:2"


def test_record_without_id_gets_its_place(tmp_path: Path) -> None:
    assert _read(tmp_path, conversations=[HUMAN, GPT]).record_id == "0"


def test_placeholders_become_images_in_order(tmp_path: Path) -> None:
    record = _read(
        tmp_path,
        image=["a.png", "b.png"],
        conversations=[_human("<image>\nfirst"), GPT, _human("and <image> now"), GPT],
    )
    first, second = (FileImage(tmp_path / name) for name in ("a.png", "b.png"))
    assert record.turns[0].parts == (ImagePart(first), "\nfirst")
    assert record.turns[2].parts == ("and ", ImagePart(second), " now")
    assert record.images == (first, second)


@pytest.mark.parametrize("first", [[HUMAN], [SYSTEM, HUMAN]])
def test_one_image_without_placeholder_goes_to_the_first_question(
    tmp_path: Path, first: list[dict[str, str]]
) -> None:
    record = _read(tmp_path, image="a.png", conversations=[*first, GPT, HUMAN, GPT])
    image = ImagePart(FileImage(tmp_path / "a.png"))
    assert record.turns[len(first) - 1].parts == (image, "\nwhat?")


@pytest.mark.parametrize("start", [[GPT], [SYSTEM, GPT]])
def test_first_answer_without_question_is_dropped(
    tmp_path: Path, start: list[dict[str, str]]
) -> None:
    record = _read(tmp_path, conversations=[*start, HUMAN, GPT])
    assert [turn.role for turn in record.turns][-2:] == ["user", "assistant"]
    assert len(record.turns) == len(start) + 1


@pytest.mark.parametrize("image", [None, "", []])
def test_record_may_say_that_it_has_no_image(tmp_path: Path, image: object) -> None:
    assert _read(tmp_path, image=image, conversations=[HUMAN, GPT]).images == ()


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"image": "a.png", "conversations": [_human("<image><image>"), GPT]}, "2 <image> .* 1 im"),
        ({"image": ["a.png", "b.png"], "conversations": [HUMAN, GPT]}, "0 <image> .* 2 images"),
        ({"conversations": [_human("<image>"), GPT]}, "1 <image> .* 0 images"),
        (
            {"image": "a.png", "conversations": [HUMAN, {"from": "gpt", "value": "<image>"}]},
            "outside a human turn",
        ),
        ({"image": "absent.png", "conversations": [HUMAN, GPT]}, "absent.png does not exist"),
        ({"image": 5, "conversations": [HUMAN, GPT]}, "image=5"),
        ({"image": ["a.png", 5], "conversations": [HUMAN, GPT]}, "expected a path or a list"),
        ({"conversations": []}, "expected a list of turns"),
        ({}, "conversations=None"),
        ({"conversations": "what?"}, "expected a list of turns"),
        ({"conversations": [HUMAN, "that"]}, "turn 1 lacks"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": 5}]}, "turn 1 lacks"),
        ({"conversations": [HUMAN, {"from": "robot", "value": "x"}]}, "turn 1 is from 'robot'"),
        ({"conversations": [HUMAN, {"from": ["gpt"], "value": "x"}]}, "turn 1 is from .'gpt'."),
        ({"conversations": [HUMAN, {"from": {"a": 1}, "value": "x"}]}, "turn 1 is from "),
        ({"conversations": [_human(" "), GPT]}, "question 0 is empty"),
        ({"conversations": [HUMAN, GPT, _human(""), GPT]}, "question 2 is empty"),
        ({"image": "a" * 300, "conversations": [HUMAN, GPT]}, "image .*… does not exist"),
        (
            {"image": "data:image/png;base64," + "iVBO/" * 1600, "conversations": [HUMAN, GPT]},
            "image .*… does not exist",
        ),
        ({"conversations": [HUMAN, HUMAN, GPT]}, "by turns"),
        ({"conversations": [HUMAN, GPT, GPT]}, "by turns"),
        ({"conversations": [GPT]}, "by turns"),
        ({"conversations": [GPT, GPT, HUMAN, GPT]}, "by turns"),
        ({"conversations": [SYSTEM]}, "by turns"),
        ({"conversations": [HUMAN, GPT, SYSTEM]}, "turn 2 is the system's"),
        ({"conversations": [HUMAN]}, "last turn is the human's"),
        ({"conversations": [HUMAN, GPT, HUMAN]}, "last turn is the human's"),
    ],
)
def test_malformed_record_is_refused_with_its_place(
    tmp_path: Path, record: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(SampleError, match=complaint) as caught:
        _read(tmp_path, **record)
    assert str(caught.value).startswith(f"{tmp_path / 'data.jsonl'}:2: ")
