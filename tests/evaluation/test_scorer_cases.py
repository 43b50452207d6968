"""Every case of the published scorers, one test each: what the official code returned is returned.

The file is the one that the environment variable `SCORER_CASES` names, else the copy beside this.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mono_internvl.evaluation import toolkits
from mono_internvl.evaluation.metrics import (
    averages,
    captions,
    choices,
    math_vista,
    mmmu,
    text,
    vqa,
    yes_no,
)
from mono_internvl.processing.tiling.internvl import InternVLTiling

FILE = Path(os.environ.get("SCORER_CASES") or Path(__file__).with_name("scorer_cases.json"))
CASES: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
TOLERANCE = 1e-6
ONE_DECIMAL = 0.05 + TOLERANCE
NO_ANSWER = (None, "", 0, False)

Inputs = Mapping[str, Any]
Scorer = Callable[[Inputs], Any]


def _mean(score: Callable[[Inputs], float]) -> Scorer:
    return lambda x: sum(map(score, x["items"])) / len(x["items"])


def _soft(x: Inputs) -> float:
    return vqa.soft_accuracy(x["prediction"], x["answers"])


def _soft_vlmevalkit(x: Inputs) -> float:
    return vqa.soft_accuracy(x["prediction"], x["answers"], vqa.normalise_vlmevalkit, None)


def _anls(x: Inputs) -> float:
    return text.anls(x["prediction"], x["answers"])


def _relaxed(is_swapped: bool) -> Scorer:
    return lambda x: text.relaxed_accuracy(x["prediction"], x["answer"], is_swapped=is_swapped)


def _infer(is_strict: bool) -> Scorer:
    return lambda x: (
        choices.infer_choice(x["prediction"], x["choices"], is_strict=is_strict) or False
    )


def _subtasks(x: Inputs) -> dict[str, float]:
    """Points of MME's subtasks; those that a case leaves out are answered rightly."""
    given = {
        name: yes_no.mme_subtask(
            (row[0], bool(row[1]) if len(row) == 2 else row[1].lower() == row[2].lower())
            for row in rows
        )
        for name, rows in x["subtasks"].items()
    }
    return dict.fromkeys((*yes_no.PERCEPTION, *yes_no.COGNITION), 200.0) | given


def _mme_rating(x: Inputs) -> dict[str, float]:
    points = _subtasks(x)
    total = yes_no.mme_total(points)
    named = {name: points[name] for name in x["subtasks"]}
    return {"perception": total["perception"], "reasoning": total["cognition"], **named}


def _mme_lmms(x: Inputs) -> float:
    categories: dict[str, list[tuple[str, bool]]] = {}
    for row in x["results"]:
        categories.setdefault(row["category"], []).append((row["question_id"], bool(row["score"])))
    return sum(map(yes_no.mme_subtask, categories.values()))


def _mme_label(x: Inputs) -> dict[str, str]:
    processed = yes_no.mme_processed(x["response"])
    return {"processed": processed, "label": yes_no.mme_label(processed)}


def _question(x: Inputs) -> math_vista.MathQuestion:
    base = {"answer_type": "integer", "answer": "14", "choices": ["3/11", "8/11", "6/11", "3/5"]}
    names = ("question_type", "answer_type", "answer", "choices", "answer_option", "precision")
    return math_vista.MathQuestion(**base | {name: x[name] for name in names if name in x})


def _circular(x: Inputs) -> int:
    rounds = zip(x["predictions"], choices.rotations(x["options"]), x["answers"], strict=True)
    return choices.circular_hit(rounds)


def _seed(x: Inputs) -> dict[str, Any]:
    letter = choices.seed_letter(x["prediction"])
    return {"pred": letter, "correct": letter.lower() == x["answer"].lower()}


def _cider(scores: tuple[float, list[float]]) -> dict[str, Any]:
    return {"corpus": scores[0], "per_image": scores[1]}


def _cider_of(x: Inputs, tokens: Callable[[str], str]) -> dict[str, Any]:
    references = {key: [*map(tokens, texts)] for key, texts in x["references"].items()}
    return _cider(
        captions.cider(references, {key: tokens(t) for key, t in x["predictions"].items()})
    )


def _average(columns: tuple[str, ...]) -> Scorer:
    return lambda x: averages.average(x, columns)


def _prompt(x: Inputs) -> Any:
    name = x["dataset"]
    if "line" in x:
        return toolkits.vlmevalkit_prompt(name, x["line"])
    fields = {key: value for key, value in x.items() if key != "dataset"}
    if name.startswith("mmbench"):
        fields = {"question": "What is shown?", "A": "cat", "B": "dog"} | fields
    prompt = toolkits.internvl_prompt(name, fields)
    if name.startswith("scienceqa"):
        return {"prompt": prompt, "answer": "ABCDE"[x["answer"]]}
    return prompt


def _tiling(x: Inputs) -> dict[str, int]:
    tiling = InternVLTiling(max_tiles=x["max_num"])
    columns, rows = tiling.grid(x["width"], x["height"])
    layout = tiling.layout(x["width"], x["height"], 16)
    return {
        "cols": columns,
        "rows": rows,
        "tiles_with_thumbnail": layout.num_tiles,
        "visual_tokens": layout.num_tokens,
    }


SCORERS: dict[str, Scorer] = {
    "anls.internvl": _anls,
    "anls.internvl.dataset": _mean(_anls),
    "anls.lmms": _anls,
    "anls.vlmevalkit": _anls,
    "avg_multimodal.paper": _average(averages.MULTIMODAL),
    "avg_vqa.paper": _average(averages.VQA),
    "can_infer.vlmevalkit_2410": _infer(is_strict=False),
    "can_infer.vlmevalkit_head": _infer(is_strict=True),
    "cider_d.pycocoevalcap": lambda x: _cider(
        captions.cider(x["gts"], {key: texts[0] for key, texts in x["res"].items()})
    ),
    "cider_end_to_end.pycocoevalcap": lambda x: _cider_of(x, captions.ptb_tokens),
    "cider_untokenized.vlmevalkit": lambda x: _cider_of(x, str),
    "exact_match.internvl": lambda x: text.exact_match(x["prediction"], x["answer"]),
    "exact_match.lmms": lambda x: text.exact_match_without_marks(x["prediction"], x["answer"]),
    "exact_match.vlmevalkit": lambda x: text.exact_match(x["prediction"], x["answer"]),
    "gqa_convert.internvl": lambda x: text.gqa_answer(x["prediction"]),
    "hallusion_rating.vlmevalkit": lambda x: yes_no.hallusion_rating(x["rows"]),
    "mathvista_normalize.internvl": lambda x: math_vista.normalised(_question(x), x["extraction"]),
    "mathvista_post_check.vlmevalkit": lambda x: math_vista.is_right(_question(x), x["res"]),
    "mathvista_prefetch.vlmevalkit": lambda x: math_vista.prefetched(_question(x), x["prediction"]),
    "mathvista_quick_extract.internvl": lambda x: math_vista.quick_extract(x["response"]),
    "max_tiles.internvl15_guide": lambda x: toolkits.internvl_tiles(x["dataset"]),
    "max_tiles.vlmevalkit_internvl": lambda x: toolkits.vlmevalkit_tiles(x["dataset"]),
    "mcq_circular.vlmevalkit": _circular,
    "mcq_hit.vlmevalkit": lambda x: int(
        choices.is_choice(x["prediction"], x["choices"], x["answer"])
    ),
    "mcq_post_process.internvl": lambda x: choices.first_letter(x["prediction"], x["options"]),
    "mme_aggregate.lmms": _mme_lmms,
    "mme_label.internvl": _mme_label,
    "mme_label.lmms": lambda x: yes_no.mme_label_lmms(x["response"]),
    "mme_rating.vlmevalkit": _mme_rating,
    "mme_subtask.internvl": lambda x: yes_no.mme_subtask(
        (q["image"], q["gt"].lower() == q["pred"].lower()) for q in x["questions"]
    ),
    "mme_total.internvl": lambda x: yes_no.mme_total(_subtasks(x)),
    "mmmu_open.internvl": lambda x: mmmu.is_open_answer(x["response"], x["answer"]),
    "mmmu_open_as_mcq.vlmevalkit": lambda x: int(
        mmmu.is_open_answer_as_choice(x["prediction"], x["answer"])
    ),
    "mmmu_parse_mc.internvl": lambda x: mmmu.parse_letter(
        x["response"], x["choices"], x["index2ans"]
    ),
    "mmvet_aggregate.vlmevalkit": lambda x: averages.mmvet_report(
        (item["category"], item["score"]) for item in x["items"]
    ),
    "ocrbench.vlmevalkit": lambda x: text.ocrbench_hit(
        x["prediction"], x["answers"], x["category"]
    ),
    "ocrbench_final.vlmevalkit": lambda x: text.ocrbench_total(
        (i["category"], text.ocrbench_hit(i["prediction"], i["answers"], i["category"]))
        for i in x["items"]
    ),
    "prompt.internvl": _prompt,
    "prompt.vlmevalkit_internvl": _prompt,
    "ptb_tokenize.pycocoevalcap": lambda x: captions.ptb_tokens(x["caption"]),
    "relaxed_accuracy.corrected": _relaxed(is_swapped=False),
    "relaxed_accuracy.internvl": _relaxed(is_swapped=True),
    "relaxed_accuracy.internvl.test_avg": lambda x: (x["human"] + x["augmented"]) / 2,
    "report_acc.vlmevalkit": lambda x: choices.report_accuracy(x["rows"]),
    "seed_letter": _seed,
    "sqa_match.lmms": lambda x: float(
        choices.is_science_answer(x["prediction"], "ABCDEFGHIJ"[x["answer_index"]])
    ),
    "sqa_post_process.internvl": lambda x: choices.science_letter(x["prediction"], x["options"]),
    "tiling.internvl": _tiling,
    "videomme_letter.vlmevalkit": lambda x: choices.video_letter(x["response"]),
    "vqa_normalize.internvl": lambda x: vqa.normalise(x["text"]),
    "vqa_normalize.vlmevalkit": lambda x: vqa.normalise_vlmevalkit(x["text"]),
    "vqa_soft.internvl": _soft,
    "vqa_soft.internvl.dataset": _mean(_soft),
    "vqa_soft.vlmevalkit": _soft_vlmevalkit,
    "yorn_extract.vlmevalkit": lambda x: yes_no.yes_or_no(x["response"]),
}


def is_same(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether a result is what the official code returned, numbers within a tolerance."""
    if isinstance(expected, dict) and set(expected) == {"error"}:
        return found in NO_ANSWER
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and set(found) == set(expected)
            and all(is_same(found[key], expected[key], tolerance) for key in expected)
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(
            is_same(one, other, tolerance) for one, other in zip(found, expected, strict=True)
        )
    if isinstance(expected, float) or (
        isinstance(expected, int) and not isinstance(expected, bool)
    ):
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        return is_number and abs(found - expected) <= tolerance
    return type(found) is type(expected) and bool(found == expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_scorer_case(case: dict[str, Any]) -> None:
    metric = case["metric"]
    assert metric in SCORERS, f"unknown metric {metric!r}"
    tolerance = ONE_DECIMAL if metric.startswith("avg_") else TOLERANCE
    found = SCORERS[metric](case["inputs"])
    assert is_same(found, case["expected"], tolerance), (found, case["expected"])


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (True, 1),
        (1.001, 1.0),
        ("A", False),
        ({"a": 1}, {"b": 1}),
        ([1], [1, 2]),
        (0.5, {"error": ""}),
    ],
)
def test_comparison_can_fail(found: Any, expected: Any) -> None:
    assert not is_same(found, expected, TOLERANCE)


def test_every_metric_of_the_copy_is_asked() -> None:
    copy = json.loads(Path(__file__).with_name("scorer_cases.json").read_text(encoding="utf-8"))
    assert len(copy) == 423 and {case["metric"] for case in copy} == set(SCORERS)
