"""The targets are a pure function of what was measured; every bound can be missed."""

from collections.abc import Iterator
from typing import Any

import pytest

from mono_internvl.miniature.scoring import mean_scores
from mono_internvl.miniature.targets import (
    CAPTION_ABOVE_BLIND,
    FULL_BOUNDS,
    QUICK_BOUNDS,
    Bound,
    above_guessing,
    judge,
)
from mono_internvl.runs.predictions import Prediction
from mono_internvl.runs.schemas import Target, TextMeasures

CIRCLE = ["large", "red", "circle", "top"]


def answers(rows: list[dict[str, Any]]) -> list[Prediction]:
    """Rows of a predictions file, whose captions need no score."""
    return [Prediction.from_row({"prediction": "", "score": 0.0, **row}) for row in rows]


def means(rows: list[dict[str, Any]], **which: bool) -> dict[str, float]:
    return {kind: mean.score for kind, mean in mean_scores(answers(rows), **which).items()}


def caption_row(words: int, objects: int = 1, **fields: Any) -> dict[str, Any]:
    """A caption of `objects` alike things that names `words` of their attributes rightly."""
    truth = [CIRCLE] * objects
    said = [
        {4: "a large red circle at the top", 2: "red circle", 0: "a blue star"}[part]
        for part in ([4] * (words // 4) + [words % 4] + [0] * objects)[:objects]
    ]
    return {"kind": "caption", "attributes": truth, "prediction": " and ".join(said), **fields}


def rows(kinds: dict[str, float], blind: float) -> list[dict[str, Any]]:
    found = []
    for kind, score in kinds.items():
        if kind == "caption":  # of 200 attributes, in steps of two
            right = round(score * 100)
            found += [caption_row(4, blind=False) for _ in range(right // 2)]
            found += [caption_row(2, blind=False) for _ in range(right % 2)]
            found += [caption_row(0, blind=False) for _ in range(50 - right // 2 - right % 2)]
            found += [caption_row(0, blind=True)]
            continue
        found += [{"kind": kind, "score": score, "blind": False} for _ in range(4)]
        found += [{"kind": kind, "score": blind, "blind": True} for _ in range(2)]
    found += [
        {"kind": "fact_cloze", "score": 1.0, "blind": False, "is_replayed": replayed}
        for replayed in (True, False)
    ]
    return found


KINDS = ("caption", "colour", "shape", "count", "position", "existence", "grounding", "ocr")
GOOD = dict.fromkeys((*KINDS, "chart", "novel"), 0.95)


def judged(
    scores: dict[str, float] = GOOD,
    blind: float = 0.2,
    perplexity: float = 33.0,
    identical: bool = True,
    minutes: float = 5.0,
    bounds: dict[str, Bound] = FULL_BOUNDS,
) -> dict[str, Target]:
    found = judge(
        bounds,
        {"start": answers(rows({}, 0.0)), "s2": answers(rows(scores, blind))},
        {
            "start": TextMeasures(32.0, True),
            "s11": TextMeasures(32.0, True),
            "s12": TextMeasures(32.0, identical),
            "s2": TextMeasures(perplexity, False),
        },
        minutes,
    )
    return {target.name: target for target in found}


def test_judge_meets_all_bounds() -> None:
    assert all(target.is_met for target in judged().values())


def worse() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "caption attributes", {"scores": {**GOOD, "caption": 0.89}}
    for kind in ("colour", "shape", "count", "position"):
        yield above_guessing(kind), {"scores": {**GOOD, kind: 0.49}}
    yield "grounding IoU", {"scores": {**GOOD, "grounding": 0.44}}
    yield "OCR, 1 - character error rate", {"scores": {**GOOD, "ocr": 0.49}}
    yield "chart questions", {"scores": {**GOOD, "chart": 0.74}}
    yield "naming of unseen pairs", {"scores": {**GOOD, "novel": 0.39}}
    yield "text-only logits bit-identical after S1.1 and S1.2", {"identical": False}
    yield "perplexity, after S2 / start", {"perplexity": 41.0}
    yield "CPU minutes", {"minutes": 20.1}
    yield "caption attributes", {"scores": {k: v for k, v in GOOD.items() if k != "caption"}}


@pytest.mark.parametrize(("name", "changed"), list(worse()))
def test_judge_misses(name: str, changed: dict[str, Any]) -> None:
    assert not judged(**changed)[name].is_met


@pytest.mark.parametrize("bounds", [FULL_BOUNDS, QUICK_BOUNDS], ids=["full", "quick"])
def test_bounds_are_missed_by_a_model_that_sees_nothing(bounds: dict[str, Bound]) -> None:
    """With every picture score at zero, and with a model that says the same with and without."""
    nothing = judged(dict.fromkeys(GOOD, 0.0), blind=0.0, bounds=bounds)
    pictures = [name for name in nothing if "caption" in name or "question" in name]
    assert len([name for name in pictures if not nothing[name].is_met]) >= 2
    guessing = judged({**dict.fromkeys(GOOD, 0.4), "caption": 0.0}, blind=0.4, bounds=bounds)
    missed = {name for name, target in guessing.items() if not target.is_met}
    assert {above_guessing("colour"), above_guessing("position")} <= missed
    assert missed & {"caption attributes", CAPTION_ABOVE_BLIND}
    assert all(target.is_met for target in judged(bounds=bounds).values())


def test_judge_counts_above_chance_where_blind_is_worse_than_chance() -> None:
    found = judged({**GOOD, "count": 0.5}, blind=0.0)[above_guessing("count")]
    assert found.value == pytest.approx(0.5 - 1 / 3)
    assert not found.is_met


def test_mean_scores_pools_captions() -> None:
    """Right over all true attributes: 4 of 4 and 2 of 12 are 6 of 16, not the mean of 1 and 1/6."""
    found = [caption_row(4, blind=False), caption_row(2, objects=3, blind=False)]
    assert means(found) == {"caption": 6 / 16}


def test_mean_scores_counts_an_object_too_many_against_other_captions() -> None:
    extra = caption_row(4, blind=False)
    extra["prediction"] += " and a blue star" * 6
    assert means([extra, caption_row(4, blind=False)]) == {"caption": (4 - 6 + 4) / 8}


def test_mean_scores_leaves_out_aligned_and_blind() -> None:
    found = [
        {"kind": "ocr", "score": 1.0, "blind": False},
        {"kind": "ocr", "score": 0.0, "blind": True},
        {"kind": "ocr", "score": 0.0, "blind": False, "aligned": True},
    ]
    assert means(found) == {"ocr": 1.0}
    assert means(found, blind=True) == {"ocr": 0.0}
