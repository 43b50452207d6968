"""How the two toolkits behind the published figures ask: prompts and tiles, by data set.

`internvl` is InternVL's own scripts with the tiles of its InternVL-1.5 guide, `vlmevalkit` is
VLMEvalKit's InternVLChat. Which benchmark was asked by which: `benchmarks/table.py`.

Source: internvl_chat/eval at 2410d1d, document/How_to_evaluate_internvl_chat_v1_5.md at ac7087b,
VLMEvalKit at 058f673.
"""

from __future__ import annotations

import ast
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mono_internvl.errors import SampleError

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CHINESE = "请直接回答选项字母。"
CAPTION = "Provide a one-sentence caption for the provided image."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'. "
VIDEO_FRAMES = "These are the frames of a video. "
SUBTITLES = "This video's subtitles are listed below:"
VIDEO = (
    "Select the best answer to the following multiple-choice "
    "question based on the video. Respond with only the letter (A, B, C, or D) of the correct "
    "option."
)

DEFAULT_TILES = 6
_INTERNVL_TILES = {"mme": 12, "chartqa": 12, "docvqa": 18, "textvqa": 24, "infographicsvqa": 24}
_VLMEVALKIT_TILES = {
    "ChartQA_TEST": 12,
    "MMMU_DEV_VAL": 12,
    "MMMU_TEST": 12,
    "DocVQA_VAL": 18,
    "DocVQA_TEST": 18,
    "InfoVQA_VAL": 24,
    "InfoVQA_TEST": 24,
    "OCRBench": 24,
    "Video-MME": 1,
    "MMBench-Video": 1,
    "MVBench": 1,
}
_UNCHANGED = ("MathVista", "MathVision", "MathVerse", "VCR", "MTVQA", "MMVet")
_CHINESE = re.compile("[\u4e00-\u9fff]")

Prompt = Callable[[str, Mapping[str, Any]], str]
"""Data set and fields of a row to the question that is asked."""


def internvl_tiles(dataset: str) -> int:
    """Most tiles per image in InternVL-1.5's guide."""
    return next(
        (tiles for name, tiles in _INTERNVL_TILES.items() if dataset.startswith(name)),
        DEFAULT_TILES,
    )


def vlmevalkit_tiles(dataset: str) -> int:
    """Most tiles per image in VLMEvalKit's InternVLChat."""
    return _VLMEVALKIT_TILES.get(dataset, DEFAULT_TILES)


def is_given(value: Any) -> bool:
    """Whether a cell holds something: no None, no nan, no empty text."""
    return not (value is None or value == "" or (isinstance(value, float) and math.isnan(value)))


def options_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Text of each letter: columns A, B, ..., or a list in `choices` or `options`.

    Raises:
        SampleError: The list cannot be read.
    """
    columns = {c: str(row[c]) for c in string.ascii_uppercase if c in row and is_given(row[c])}
    if columns:
        return columns
    field = next((name for name in ("choices", "options") if is_given(row.get(name))), None)
    texts = list_of(row[field], field) if field is not None else []
    return dict(zip(string.ascii_uppercase, (str(text).strip() for text in texts), strict=False))


def list_of(value: Any, field: str) -> list[Any]:
    """A list, or the one that a text writes as Python does; any other value alone in one.

    Raises:
        SampleError: A text begins as a list and is none.
    """
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return list(value)
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            found = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise SampleError(
                f"{field}={value[:80]!r}; expected a list as Python writes it, correct the row"
            ) from error
        return list(found)
    return list(value) if hasattr(value, "tolist") else [value]


def _lettered(question: str, options: Mapping[str, str]) -> str:
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items())])


def _with_hint(row: Mapping[str, Any]) -> str:
    hint, question = row.get("hint"), str(row["question"])
    return f"{hint}\n{question}" if is_given(hint) else question


def internvl_prompt(dataset: str, row: Mapping[str, Any]) -> str:
    """The question of InternVL's script for a data set such as `textvqa_val`."""
    if dataset.startswith(("mmbench", "ccbench")):
        is_chinese = "cn" in dataset.split("_")
        asked = _lettered(_with_hint(row), options_of(row))
        return f"{asked}\n{LETTER_CHINESE if is_chinese else LETTER}"
    if dataset.startswith(("scienceqa", "sqa")):
        return f"{_lettered(_with_hint(row), options_of(row))}\n{LETTER}"
    if dataset.startswith("seed"):
        if is_given(row.get("text")):
            return str(row["text"])
        return f"{_lettered(str(row['question']), options_of(row))}\n{LETTER}"
    if dataset.startswith("mmmu"):
        if row.get("question_type") == "open":
            return f"{row['question']}\n{SHORT}"
        return f"{_lettered(str(row['question']), options_of(row))}\n{LETTER}"
    if dataset.startswith("mmvet"):
        return f"{row['question']} "
    if dataset.startswith(("coco", "flickr30k", "nocaps")):
        return CAPTION
    if dataset.startswith("ai2d"):
        options = options_of(row)
        if not options:
            return str(row["question"])
        return f"{_lettered(str(row['question']), options)}\n{LETTER}"
    if dataset.startswith("vizwiz"):
        return f"{row['question']} {UNANSWERABLE}{SHORT}"
    return f"{row['question']} {SHORT}"


def vlmevalkit_prompt(dataset: str, row: Mapping[str, Any]) -> str:
    """The question of VLMEvalKit's InternVLChat for a data set such as `OCRBench`."""
    question = str(row["question"])
    if dataset == "Video-MME":
        options = options_of(row)
        texts = [t if t.startswith(f"{c}. ") else f"{c}. {t}" for c, t in options.items()]
        said = row.get("subtitles")
        begin = f"{VIDEO_FRAMES}{SUBTITLES}\n{said}\n" if is_given(said) else VIDEO_FRAMES
        return "\n".join([f"{begin}{VIDEO}", question, *texts, LETTER])
    if dataset.startswith("MME") and not dataset.startswith("MME-"):
        return f"{question} {SHORT}"
    if dataset.startswith("HallusionBench"):
        return f"{question} Please answer yes or no. {SHORT}"
    if dataset.startswith(_UNCHANGED):
        return question
    options = options_of(row)
    if options or dataset.startswith("MMMU"):
        asked = _lettered(_with_hint(row), options)
        is_chinese = _CHINESE.search(asked) is not None
        if options:
            return f"{asked}\n{LETTER_CHINESE if is_chinese else LETTER}"
        return f"{asked}\n{'请直接回答问题。' if is_chinese else 'Answer the question directly.'}"
    return f"{question}\n{SHORT}"
