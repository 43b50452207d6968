"""The targets are a pure function of what was measured; every bound can be missed."""

from collections.abc import Iterator
from typing import Any

import pytest

from mono_internvl.miniature.targets import FULL_BOUNDS, Target, judge, mean_scores


def rows(kinds: dict[str, float], blind: float) -> list[dict[str, Any]]:
    found = []
    for kind, score in kinds.items():
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
    minutes: float = 10.0,
) -> dict[str, Target]:
    found = judge(
        FULL_BOUNDS,
        {"start": rows({}, 0.0), "s2": rows(scores, blind)},
        {"start": 32.0, "s2": perplexity},
        {"s11": True, "s12": identical},
        minutes,
    )
    return {target.name: target for target in found}


def test_judge_meets_all_bounds() -> None:
    assert all(target.met for target in judged().values())


def worse() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "caption attributes", {"scores": {**GOOD, "caption": 0.89}}
    for kind in ("colour", "shape", "count", "position"):
        yield f"{kind} question, above blind", {"scores": {**GOOD, kind: 0.49}}
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
    assert not judged(**changed)[name].met


def test_mean_scores_leaves_out_aligned_and_blind() -> None:
    found = [
        {"kind": "ocr", "score": 1.0, "blind": False},
        {"kind": "ocr", "score": 0.0, "blind": True},
        {"kind": "ocr", "score": 0.0, "blind": False, "aligned": True},
    ]
    assert mean_scores(found) == {"ocr": 1.0}
    assert mean_scores(found, blind=True) == {"ocr": 0.0}
