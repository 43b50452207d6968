"""What the truth of a row is, out of any form in which benchmarks are published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mono_internvl.errors import SampleError
from mono_internvl.evaluation.data_files import Row
from mono_internvl.evaluation.metrics import vqa, yes_no
from mono_internvl.evaluation.toolkits import is_given, list_of, options_of

VIDEO_PARTS = ("duration", "domain", "sub_category", "task_type")
"""Columns of Video-MME that its accuracy is told by."""


def _answer(row: Row, name: str = "answer") -> str:
    value = row.fields.get(name)
    if not is_given(value):
        raise SampleError(f"{row.where}: no `{name}`; this split is scored by a server, or damaged")
    return str(value)


def _answers(row: Row) -> list[str]:
    """The truths of a row in any form: a list, one as text, VQA's objects, a single value."""
    for name in ("answers", "answer", "caption", "captions", "annotations_captions"):
        if is_given(row.fields.get(name)):
            found = list_of(row.fields[name], name)
            return [str(one["answer"] if isinstance(one, Mapping) else one) for one in found]
    raise SampleError(f"{row.where}: no `answers`; this split is scored by a server, or damaged")


def choice_truth(row: Row) -> dict[str, Any]:
    options = options_of(row.fields)
    answer = row.fields.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer = chr(ord("A") + answer)  # ScienceQA counts its choices
    if not is_given(answer):
        raise SampleError(f"{row.where}: no `answer`; this split is scored by a server, or damaged")
    letter = str(answer).strip()
    if options and letter not in options:
        raise SampleError(f"{row.where}: answer={letter!r}; expected one of {', '.join(options)}")
    named = {
        name: str(row.fields[name])
        for name in ("category", "l2-category")
        if is_given(row.fields.get(name))
    }
    return {"answer": letter, "options": options, **named}


def unanswered_choice_truth(row: Row) -> dict[str, Any]:
    truth = {"options": options_of(row.fields), "index": _index(row)}
    return {**truth, "answer": None, "question": str(row.fields.get("question", ""))}


def _index(row: Row) -> int:
    try:
        return int(float(str(row.fields.get("index", row.fields.get("id")))))
    except ValueError:
        raise SampleError(
            f"{row.where}: no number as `index`, by which rotations are told"
        ) from None


def circular_truth(row: Row) -> dict[str, Any]:
    return {**choice_truth(row), "index": _index(row)}


def mmmu_truth(row: Row) -> dict[str, Any]:
    is_open = row.fields.get("question_type") == "open" or not options_of(row.fields)
    if not is_open:
        return {**choice_truth(row), "is_open": False}
    answers = [str(one) for one in list_of(_answer(row), "answer")]
    return {"answer": answers[0], "answers": answers, "options": {}, "is_open": True}


def yes_no_truth(row: Row) -> dict[str, Any]:
    answer = _answer(row).strip().strip(".").lower()
    answer = {"1": "yes", "0": "no"}.get(answer, answer)  # HallusionBench's own file
    if answer not in ("yes", "no"):
        raise SampleError(f"{row.where}: answer={answer!r}; expected yes or no")
    return {"answer": answer}


def mme_truth(row: Row) -> dict[str, Any]:
    category = _answer(row, "category")
    if category not in (*yes_no.PERCEPTION, *yes_no.COGNITION):
        raise SampleError(f"{row.where}: category={category!r}; expected a subtask of MME")
    image = row.fields.get("image_path") or row.fields.get("question_id")
    if not is_given(image):
        raise SampleError(f"{row.where}: no `image_path`, by which pairs of questions are told")
    return {**yes_no_truth(row), "category": category, "pair": str(image)}


def hallusion_truth(row: Row) -> dict[str, Any]:
    index = str(row.fields.get("index", ""))
    if len(index.split("_")) < 6:
        raise SampleError(
            f"{row.where}: index={index!r}; expected six parts such as VD_figure_0_1_0_0"
        )
    kind = str(row.fields.get("l2-category", row.fields.get("l2_category", index.split("_")[1])))
    return {**yes_no_truth(row), "index": index, "l2_category": kind}


def ten_truth(row: Row) -> dict[str, Any]:
    answers = _answers(row)
    if len(answers) != vqa.NUM_ANSWERS:
        raise SampleError(
            f"{row.where}: {len(answers)} answers; expected the {vqa.NUM_ANSWERS} of VQA, in "
            "`answers` or in NAME_annotations.json beside the file"
        )
    return {"answers": answers}


def answers_truth(row: Row) -> dict[str, Any]:
    return {"answers": _answers(row)}


def chart_truth(row: Row) -> dict[str, Any]:
    kind = str(row.fields.get("type", row.fields.get("split", "")))
    return {
        "answers": _answers(row),
        "part": "human" if "human" in kind else "augmented" if kind else "",
    }


def ocr_truth(row: Row) -> dict[str, Any]:
    category = row.fields.get("category", row.fields.get("question_type"))
    return {"answers": _answers(row), "category": str(category)}


def maths_truth(row: Row) -> dict[str, Any]:
    fields = row.fields
    found = (
        [str(one) for one in list_of(fields["choices"], "choices")]
        if is_given(fields.get("choices"))
        else []
    )
    kind = (
        "multi_choice"
        if fields.get("question_type") in ("multi_choice", "multi-choice")
        else "free_form"
    )
    answer = _answer(row)
    option = fields.get("answer_option")
    if kind == "multi_choice" and not is_given(option):
        if answer not in found:
            raise SampleError(f"{row.where}: answer={answer!r}; expected one of choices={found!r}")
        option = chr(ord("A") + found.index(answer))
    precision = fields.get("precision")
    return {
        "question_type": kind,
        "answer_type": str(fields.get("answer_type", "text")),
        "answer": answer,
        "choices": found,
        "answer_option": str(option) if is_given(option) else None,
        "precision": float(str(precision)) if is_given(precision) else None,
    }


def graded_truth(row: Row) -> dict[str, Any]:
    named = row.fields.get("category", row.fields.get("capability", ""))
    parts = named if isinstance(named, list) else str(named).split(",")
    return {"answer": _answer(row), "capabilities": ",".join(str(part).strip() for part in parts)}


def video_truth(row: Row) -> dict[str, Any]:
    return {**choice_truth(row), **{part: str(row.fields.get(part, "")) for part in VIDEO_PARTS}}


def no_truth(row: Row) -> dict[str, Any]:
    return {}
