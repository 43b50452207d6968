"""The order of questions: by kind and length, those on one image together."""

from pathlib import Path

from mono_internvl.data.records import Record
from mono_internvl.data.sources import FileImage
from mono_internvl.evaluation.questions import Question, in_order
from mono_internvl.processing.prompts import ImagePart, Turn


def _question(kind: str, answer: str, *images: str) -> Question:
    shown = tuple(ImagePart(FileImage(Path(name))) for name in images)
    turns = (Turn("user", (*shown, "?")), Turn("assistant", (answer,)))
    return Question(Record(turns, "0", "a.jsonl:1", {"kind": kind}))


def test_questions_on_one_image_stand_together() -> None:
    questions = [
        _question("b", "long answer", "1.png"),
        _question("a", "mid one", "2.png"),
        _question("a", "x", "1.png"),
        _question("c", "y", "2.png"),
        _question("a", "xyz"),
    ]
    assert in_order(questions) == [2, 0, 4, 1, 3]


def test_order_without_repeated_images_is_by_kind_and_length() -> None:
    questions = [_question("b", "x", "1"), _question("a", "xx", "2"), _question("a", "x"),
                 _question("a", "y", "3")]  # fmt: skip
    assert in_order(questions) == [2, 3, 1, 0]
