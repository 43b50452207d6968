"""Kinds of published benchmarks: what a row's truth is, and what answers to many rows come to.

A family takes its truth out of a row in any published form and scores answers by the pure rules in
`metrics`, twice where they differ: as the published figures were made (`paper`), and without the
quirks that are known by now (`corrected`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from mono_internvl.evaluation import truths
from mono_internvl.evaluation.data_files import Row
from mono_internvl.evaluation.metrics import averages, captions, choices, mmmu, text, vqa, yes_no
from mono_internvl.evaluation.metrics import math_vista as maths
from mono_internvl.runs.benchmark_results import CORRECTED, PAPER

ROTATION = 1_000_000
"""Rows of MMBench whose indices differ by a multiple of this are rotations of one question."""

BY_RULE = "answers extracted by rule, without a judge: not comparable with published figures"


_Found = TypeVar("_Found")

JUDGE_REQUESTS = 8
"""Most answers that a judge reads at a time."""


class Judge(Protocol):
    """A model that reads answers, several at a time from several threads.

    Attributes:
        name: Part of the result.
    """

    @property
    def name(self) -> str: ...

    def grade(self, question: str, truth: str, answer: str) -> float:
        """How right an answer is, 0 to 1."""
        ...

    def extract(self, question: str, answer: str) -> str:
        """The bare answer in a reply."""
        ...


@dataclass(frozen=True)
class Answered:
    """An answer with what is needed to score it.

    Attributes:
        truth: What `Family.truth` took out of the row.
        question: As it was asked.
        text: What the model said.
    """

    truth: Mapping[str, Any]
    question: str
    text: str


@dataclass(frozen=True)
class Scores:
    """What answers come to.

    Attributes:
        paper: As published figures were made; None where it needs a judge.
        corrected: Without known quirks; None where nothing differs.
        details: Parts, by name.
        notes: What a reader has to know.
    """

    paper: float | None
    corrected: float | None = None
    details: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def by_protocol(self) -> dict[str, float | None]:
        """By name of the scoring protocol; `corrected` only where it differs."""
        found = {PAPER: self.paper}
        return found if self.corrected is None else {**found, CORRECTED: self.corrected}


@dataclass(frozen=True)
class Family:
    """A kind of benchmark.

    Attributes:
        truth: Out of a row; `SampleError` where it is missing.
        score: Answers to a whole split; the judge is None where there is none.
        golden: The text of a perfect answer, for the contract of every benchmark.
        wrong: The text of a wrong one.
        needs_judge: Whether there is no published score without one.
    """

    truth: Callable[[Row], dict[str, Any]]
    score: Callable[[Sequence[Answered], Judge | None], Scores]
    golden: Callable[[Mapping[str, Any]], str]
    wrong: Callable[[Mapping[str, Any]], str] = lambda truth: "qqq"
    needs_judge: bool = False


def percent(hits: Sequence[float]) -> float:
    """Mean of scores in [0, 1] as a percentage; 0 of none."""
    return 100 * sum(hits) / len(hits) if hits else 0.0


# Multiple choice


def _lettered(read: Callable[[str, Mapping[str, Any]], str]) -> Callable[..., Scores]:
    def score(answered: Sequence[Answered], judge: Judge | None) -> Scores:
        paper = [read(one.text, one.truth["options"]) == one.truth["answer"] for one in answered]
        return Scores(percent(paper), percent([_is_meant(one) for one in answered]))

    return score


def _is_meant(one: Answered) -> bool:
    return choices.is_choice(one.text, one.truth["options"], one.truth["answer"], is_strict=True)


def _circular(answered: Sequence[Answered], judge: Judge | None) -> Scores:
    groups: dict[int, list[Answered]] = defaultdict(list)
    for one in answered:
        groups[one.truth["index"] % ROTATION].append(one)
    paper = [
        all(choices.first_letter(o.text, o.truth["options"]) == o.truth["answer"] for o in group)
        for group in groups.values()
    ]
    corrected = [all(map(_is_meant, group)) for group in groups.values()]
    single = percent([_is_meant(one) for one in answered])
    return Scores(percent(paper), percent(corrected), {"without rotation": single})


def _exact_letter(said: str, options: Mapping[str, Any]) -> str:
    return said.strip().upper()


def _first_character(said: str, options: Mapping[str, Any]) -> str:
    return said[:1]


def _other_letter(truth: Mapping[str, Any]) -> str:
    letters = list(truth["options"]) or ["A", "B"]
    return next(letter for letter in letters if letter != truth["answer"])


def _choice(read: Callable[[str, Mapping[str, Any]], str]) -> Family:
    return Family(truths.choice_truth, _lettered(read), lambda t: t["answer"], _other_letter)


# MMMU


def _mmmu(answered: Sequence[Answered], judge: Judge | None) -> Scores:
    paper, corrected = [], []
    for one in answered:
        truth, options = one.truth, one.truth["options"]
        if truth["is_open"]:
            is_right = mmmu.is_open_answer(one.text, truth["answers"])
            paper.append(is_right)
            corrected.append(is_right)
        else:
            paper.append(choices.first_letter(one.text, options) == truth["answer"])
            letter = mmmu.parse_letter(one.text, list(options), options)
            corrected.append(letter == truth["answer"])
    return Scores(percent(paper), percent(corrected))


def _mmmu_wrong(truth: Mapping[str, Any]) -> str:
    return "qqq" if truth["is_open"] else _other_letter(truth)


# Yes or no


def _mme(answered: Sequence[Answered], judge: Judge | None) -> Scores:
    def total(label: Callable[[str], str]) -> dict[str, float]:
        hits: dict[str, list[tuple[str, bool]]] = defaultdict(list)
        for one in answered:
            is_right = label(one.text) == one.truth["answer"]
            hits[one.truth["category"]].append((one.truth["pair"], is_right))
        points = {name: yes_no.mme_subtask(found) for name, found in hits.items()}
        return {**yes_no.mme_total(points), **points}

    paper = total(lambda said: yes_no.mme_label(yes_no.mme_processed(said)))
    corrected = total(lambda said: yes_no.yes_or_no(yes_no.mme_processed(said)).lower())
    details = {name: value for name, value in paper.items() if name != "sum"}
    return Scores(paper["sum"], corrected["sum"], details)


def _hallusion(answered: Sequence[Answered], judge: Judge | None) -> Scores:
    rows = [
        {**one.truth, "correct": yes_no.yes_or_no(one.text).lower() == one.truth["answer"]}
        for one in answered
    ]
    found = yes_no.hallusion_rating(rows)
    return Scores(found.pop("avg"), details=found)


def _other_word(truth: Mapping[str, Any]) -> str:
    return "no" if truth["answer"] == "yes" else "yes"


# Short and long answers


def _mean_of(rule: Callable[[str, Any], float]) -> Callable[..., Scores]:
    def score(answered: Sequence[Answered], judge: Judge | None) -> Scores:
        return Scores(percent([rule(one.text, one.truth["answers"]) for one in answered]))

    return score


def _common(truth: Mapping[str, Any]) -> str:
    answers = truth["answers"]
    return str(max(answers, key=answers.count))


def _gqa(answered: Sequence[Answered], judge: Judge | None) -> Scores:
    def best(rule: Callable[[str, str], float], one: Answered) -> float:
        return max(rule(one.text, answer) for answer in one.truth["answers"])

    paper = [best(lambda said, true: float(text.gqa_answer(said) == true), o) for o in answered]
    corrected = [
        best(lambda s, t: text.exact_match_without_marks(s.strip(), t.strip()), o) for o in answered
    ]
    return Scores(percent(paper), percent(corrected))


def _chart(answered: Sequence[Answered], judge: Judge | None) -> Scores:
    def mean(is_swapped: bool) -> tuple[float, dict[str, float]]:
        parts: dict[str, list[float]] = defaultdict(list)
        for one in answered:
            hit = text.relaxed_accuracy(one.text, one.truth["answers"], is_swapped=is_swapped)
            parts[one.truth["part"]].append(hit)
        means = {name or "all": percent(hits) for name, hits in parts.items()}
        return sum(means.values()) / max(1, len(means)), means

    paper, details = mean(is_swapped=True)
    notes = () if set(details) == {"human", "augmented"} else ("only a part of its two halves",)
    return Scores(paper, mean(is_swapped=False)[0], details, notes if answered else ())


def _ocr(answered: Sequence[Answered], judge: Judge | None) -> Scores:
    found = text.ocrbench_total(
        (
            one.truth["category"],
            text.ocrbench_hit(one.text, one.truth["answers"], one.truth["category"]),
        )
        for one in answered
    )
    total = found.pop("Final Score")
    found.pop("Final Score Norm")
    return Scores(total, details=found)


# With a judge


def _judged(of: Callable[[Answered], _Found], answered: Sequence[Answered]) -> list[_Found]:
    """`of` each answer, in order, a few at a time: a judge answers over a network.

    The first error ends it; what was not asked yet is not asked any more.
    """
    pool = ThreadPoolExecutor(JUDGE_REQUESTS)
    try:
        return list(pool.map(of, answered))
    finally:
        pool.shutdown(cancel_futures=True)


def _maths(answered: Sequence[Answered], judge: Judge | None) -> Scores:
    asked = [(maths.MathQuestion(**one.truth), one) for one in answered]
    by_rule = percent([maths.is_right_by_rule(question, one.text) for question, one in asked])
    early = [maths.prefetched(question, one.text) for question, one in asked]
    details = {"read without a judge": percent([bool(found) for found in early])}
    if judge is None:
        return Scores(None, by_rule, details, (f"corrected: {BY_RULE}",))
    unread = [one for (_, one), found in zip(asked, early, strict=True) if not found]
    extracted = iter(_judged(lambda one: judge.extract(one.question, one.text), unread))
    hits = [
        maths.is_right(question, str(found) if found else next(extracted))
        for (question, _), found in zip(asked, early, strict=True)
    ]
    return Scores(percent(hits), by_rule, details, (f"corrected: {BY_RULE}",))


def _maths_wrong(truth: Mapping[str, Any]) -> str:
    if truth["question_type"] == "multi_choice":
        return next(
            chr(ord("A") + i) for i, c in enumerate(truth["choices"]) if c != truth["answer"]
        )
    return "-987654321"


def _graded(answered: Sequence[Answered], judge: Judge | None) -> Scores:
    if judge is None:
        return Scores(None, notes=("needs a judge",))
    grades = _judged(lambda one: judge.grade(one.question, one.truth["answer"], one.text), answered)
    capabilities = (one.truth["capabilities"] for one in answered)
    found = averages.mmvet_report(list(zip(capabilities, grades, strict=True)))
    return Scores(found.pop("Overall", 0.0), details=found)


# Captions and videos


def _captions(answered: Sequence[Answered], judge: Judge | None) -> Scores:
    tokenizer = captions.best_tokenizer()
    said = tokenizer.tokens([one.text for one in answered])
    counts = [len(one.truth["answers"]) for one in answered]
    flat = tokenizer.tokens([caption for one in answered for caption in one.truth["answers"]])
    references, start = {}, 0
    for number, count in enumerate(counts):
        references[str(number)] = flat[start : start + count]
        start += count
    score, _ = captions.cider(references, {str(n): caption for n, caption in enumerate(said)})
    exact = () if tokenizer.is_exact else (f"tokens by {tokenizer.name}; papers use Stanford's",)
    return Scores(100 * score, notes=exact)


def _video(answered: Sequence[Answered], judge: Judge | None) -> Scores:
    every: list[float] = []
    parts: dict[str, list[float]] = defaultdict(list)
    for one in answered:
        is_right = choices.video_letter(one.text) == one.truth["answer"]
        every.append(float(is_right))
        for part in truths.VIDEO_PARTS:
            if name := one.truth.get(part):
                parts[name if part == "duration" else f"{part}: {name}"].append(float(is_right))
    details = {name: percent(hits) for name, hits in parts.items()}
    return Scores(percent(every), percent([_is_meant(one) for one in answered]), details)


def _unscored(answered: Sequence[Answered], judge: Judge | None) -> Scores:
    return Scores(None, notes=("scored by a server: hand in the file in submissions/",))


FAMILIES: dict[str, Family] = {
    "circular": Family(truths.circular_truth, _circular, lambda t: t["answer"], _other_letter),
    "circular, server": Family(truths.unanswered_choice_truth, _unscored, lambda t: "A"),
    "server": Family(truths.no_truth, _unscored, lambda t: ""),
    "letter alone": _choice(_exact_letter),
    "first character": _choice(_first_character),
    "first letter": _choice(choices.first_letter),
    "mmmu": Family(truths.mmmu_truth, _mmmu, lambda t: t["answer"], _mmmu_wrong),
    "mme": Family(truths.mme_truth, _mme, lambda t: t["answer"].title(), _other_word),
    "hallusion": Family(
        truths.hallusion_truth, _hallusion, lambda t: t["answer"].title(), _other_word
    ),
    "vqa": Family(truths.ten_truth, _mean_of(vqa.soft_accuracy), _common),
    "gqa": Family(truths.answers_truth, _gqa, _common),
    "anls": Family(truths.answers_truth, _mean_of(text.anls), _common),
    "relaxed": Family(truths.chart_truth, _chart, _common),
    "ocrbench": Family(truths.ocr_truth, _ocr, _common),
    "mathvista": Family(
        truths.maths_truth,
        _maths,
        lambda t: t["answer_option"] or t["answer"],
        _maths_wrong,
        needs_judge=True,
    ),
    "mmvet": Family(truths.graded_truth, _graded, lambda t: t["answer"], needs_judge=True),
    "captions": Family(truths.answers_truth, _captions, _common),
    "video": Family(truths.video_truth, _video, lambda t: t["answer"], _other_letter),
}
"""Families by name."""
