"""`mono-internvl evaluate --best-of N`: draw answers and choose one: by critic, by vote, by chance.

Draw 0 is the greedy answer. The engine reads question and image once for all draws.

Source: Best-of-N of VLMEvalKit at e8e78f05 (eight answers, the first greedy, the others at
    temperature 0.6 and top-p 0.95; the first of equals).
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mono_internvl.errors import ConfigError
from mono_internvl.evaluation.answer_formats import AnswerFormat, format_named
from mono_internvl.evaluation.benchmark import Benchmark
from mono_internvl.evaluation.critic import Critic, score_of
from mono_internvl.evaluation.drawing import draw_answers, open_subject
from mono_internvl.evaluation.metrics.metric import normalise
from mono_internvl.evaluation.protocol import Drawing, Protocol
from mono_internvl.evaluation.questions import Question, first_of_each_kind
from mono_internvl.evaluation.runner import Subject
from mono_internvl.runs.folder import exclusive, resumable
from mono_internvl.runs.json_lines import read_lines, to_line
from mono_internvl.runs.predictions import Prediction, write_predictions

DRAWING = Drawing(temperature=0.6, top_p=0.95, greedy_first=True)
GREEDY, RANDOM, VOTE, CRITIC, ANY = "greedy", "random", "vote", "critic", "any"
"""Ways to choose: draw 0, one by chance, the most frequent result, the critic's best; and whether
any of them is right, which nobody can choose."""
StepScores = Sequence[Sequence[float]]
"""Of each draw, the critic's scores of its steps."""


@dataclass(frozen=True)
class BestOf:
    """What choosing among N answers came to.

    Attributes:
        scores: Way to choose -> kind -> mean score.
        items: Questions of each kind.
        count: N.
        predictions: File of the chosen answers: the critic's or, without one, the vote's.
        protocol: How answers were drawn, as `Protocol.to_dict` gives it.
    """

    scores: dict[str, dict[str, float]]
    items: dict[str, int]
    count: int
    predictions: Path
    protocol: dict[str, Any]


def choose(
    answers: Sequence[Prediction],
    steps: StepScores | None,
    form: AnswerFormat,
    seed: int,
) -> dict[str, Prediction]:
    """One of the answers to a question, by each way to choose.

    Args:
        answers: By draw.
        steps: By draw, of a critic; None without one.
        form: Says what of an answer is voted on.
        seed: Of the choice by chance.
    """
    results = [form.extract(one.text) for one in answers]
    votes = Counter(normalise(found) for found in results if found is not None)
    winner = max(votes, key=lambda text: votes[text]) if votes else None  # the first of equals
    voted = next((n for n, found in enumerate(results) if found and normalise(found) == winner), 0)
    chosen = {
        GREEDY: answers[0],
        RANDOM: random.Random(seed).choice(list(answers)),
        VOTE: answers[voted],
        ANY: max(answers, key=lambda one: one.score or 0.0),
    }
    if steps is not None:
        best = max(range(len(answers)), key=lambda n: score_of(steps[n]))
        chosen[CRITIC] = answers[best]
    return chosen


def means_of(
    benchmark: Benchmark,
    questions: Sequence[Question],
    drawn: Sequence[Sequence[Prediction]],
    steps: Sequence[StepScores] | None,
    form: AnswerFormat,
    count: int,
) -> tuple[dict[str, dict[str, float]], dict[str, list[Prediction]]]:
    """Mean scores by way to choose and kind, and what was chosen, among the first `count` draws.

    Args:
        benchmark: Scores and groups.
        questions: That were asked.
        drawn: Answers to each.
        steps: Of a critic, to each; None without one.
        form: Says what of an answer is voted on.
        count: Draws to choose among.
    """
    chosen: dict[str, list[Prediction]] = {}
    for number, (question, answers) in enumerate(zip(questions, drawn, strict=True)):
        own = None if steps is None else steps[number][:count]
        for way, one in choose(answers[:count], own, form, question.seed()).items():
            chosen.setdefault(way, []).append(one)
    means = {
        way: {kind: mean.score for kind, mean in benchmark.mean_scores(found).items()}
        for way, found in chosen.items()
    }
    return means, chosen


def critic_scores(
    critic: Critic,
    benchmark: Benchmark,
    protocol: Protocol,
    questions: Sequence[Question],
    drawn: Sequence[Sequence[Prediction]],
    file: Path,
) -> list[StepScores]:
    """What a critic says to all answers; what `file` holds already is not asked again.

    Args:
        critic: Who scores.
        benchmark: Whose prompts these are.
        protocol: How they were asked.
        questions: That were asked.
        drawn: Answers to each.
        file: Of scores: who the critic is, then a line for each question.

    Raises:
        SampleError: An answer cannot be scored.
    """
    head = to_line({"critic": critic.subject.digest})
    known: list[dict[str, Any]] = []
    if file.exists() and (lines := read_lines(file)) and lines[0] + "\n" == head:
        known = _whole_rows(lines[1:])
    file.write_text(head + "".join(map(to_line, known)), encoding="utf-8")
    scores: list[StepScores] = []
    with file.open("a", encoding="utf-8") as rows:
        for number, (question, answers) in enumerate(zip(questions, drawn, strict=True)):
            texts = [one.text for one in answers]
            asked = {"id": question.sample.record_id, "answers": texts}
            row = known[number] if number < len(known) else None
            if row is None or {name: row.get(name) for name in asked} != asked:
                prompt = benchmark.prompt(question, protocol)
                found = critic.step_scores(prompt, texts, question.sample.where)
                row = {**asked, "steps": found}
                if number >= len(known):
                    rows.write(to_line(row))
                    rows.flush()
            scores.append(row["steps"])
    return scores


def _whole_rows(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Rows up to the first that a kill cut in two."""
    rows: list[dict[str, Any]] = []
    for text in lines:
        try:
            row = json.loads(text)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("steps"), list):
            break
        rows.append(row)
    return rows


def evaluate_best_of(
    model: str | Path,
    data: Path,
    out: Path,
    count: int,
    *,
    benchmark: Benchmark,
    critic: str | Path | None = None,
    protocol: Protocol | None = None,
    answer_format: str = "whole",
    per_kind: int | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> BestOf:
    """Draw answers and choose; a second call goes on.

    Args:
        model: Checkpoint folder or hub id.
        data: Of the benchmark.
        out: Folder: `answers.jsonl` with all draws, `critic.jsonl`, `predictions.jsonl`.
        count: Answers to each question.
        benchmark: Questions, prompts and scores.
        critic: Checkpoint that was trained on what `data steps` writes; none unless given.
        protocol: The benchmark's first unless given.
        answer_format: Where an answer's result stands, a name of `FORMATS`.
        per_kind: Only the first so many of each kind.
        device: "auto", "cpu", "cuda" or "cuda:1".
        threads: Of PyTorch; as it is set unless given.

    Raises:
        CheckpointError: A checkpoint cannot be had.
        SampleError: A record cannot be asked or scored.
        ConfigError: A setting is unknown, or `out` holds other answers.
    """
    form = format_named(answer_format)
    asked, base = form.of(benchmark), protocol or benchmark.protocol
    if count < 1:
        raise ConfigError(f"best_of={count}; expected at least 1")
    drawing = base.drawn(DRAWING)
    questions = first_of_each_kind(asked.questions(data), per_kind)
    with exclusive(out), resumable(out):
        subject: Subject | None = open_subject(model, drawing, device=device, threads=threads)
        assert subject is not None
        planned = drawing.planned(subject.plan)
        drawn = draw_answers(subject, asked, drawing, questions, count, out / "answers.jsonl")
        subject, steps = None, None  # two models need not be in memory at once
        if critic is not None:
            judge = Critic(
                open_subject(critic, base, device=device, threads=threads), base.max_tiles
            )
            steps = critic_scores(judge, asked, planned, questions, drawn, out / "critic.jsonl")
        means, chosen = means_of(asked, questions, drawn, steps, form, count)
        file = out / "predictions.jsonl"
        write_predictions(file, chosen[VOTE if critic is None else CRITIC])
    groups: Mapping[str, Any] = asked.mean_scores(chosen[GREEDY])
    return BestOf(
        scores=means,
        items={kind: mean.items for kind, mean in groups.items()},
        count=count,
        predictions=file,
        protocol=planned.to_dict(),
    )
