"""`mono-internvl data steps`: what a critic of steps learns from, by Monte-Carlo continuation.

A model answers questions step by step. From the end of each step of an answer it goes on several
times; the step is "+" if more than `threshold` of these continuations come to a right result. What
is written are chats as `critic_turns` makes them, for ordinary instruction tuning.

Source: `tools/reasoning_data_pipeline` of OpenGVLab/InternVL at 2410d1d: four answers, sixteen
    continuations, temperature 1, the 50 likeliest tokens, "+" above 0.
Differs: nothing is continued from the last step, whose answer is right or is not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mono_internvl.errors import ConfigError, SampleError
from mono_internvl.evaluation.answer_formats import format_named
from mono_internvl.evaluation.benchmark import Benchmark
from mono_internvl.evaluation.critic import (
    BAD,
    GOOD,
    critic_turns,
    joined,
    split_steps,
)
from mono_internvl.evaluation.drawing import draw_answers, open_subject
from mono_internvl.evaluation.pairs import META, RIGHT, as_conversations
from mono_internvl.evaluation.protocol import Drawing, Protocol
from mono_internvl.evaluation.questions import Question
from mono_internvl.runs.folder import begin, exclusive, resumable, write_whole
from mono_internvl.runs.json_lines import to_line
from mono_internvl.runs.predictions import Prediction

DRAWING = Drawing(temperature=1.0, top_k=50)
_Prefix = tuple[int, str]
"""Number of a question, and the beginning of an answer to it."""


@dataclass(frozen=True)
class StepPlan:
    """How steps are judged.

    Attributes:
        samples: Answers to each question.
        continuations: From the end of each step.
        threshold: Ratio of right continuations that a "+" is above.
        format: Where an answer's result stands, a name of `FORMATS`.
        drawing: How answers and continuations are drawn.

    Raises:
        ConfigError: A number is out of range, or there is no such format.
    """

    samples: int = 4
    continuations: int = 16
    threshold: float = 0.0
    format: str = "final"
    drawing: Drawing = DRAWING

    def __post_init__(self) -> None:
        for name in ("samples", "continuations"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}; expected an integer >= 1")
        if not 0 <= self.threshold < 1:
            raise ConfigError(f"threshold={self.threshold!r}; expected 0 or more, and below 1")
        format_named(self.format)


@dataclass(frozen=True)
class StepCounts:
    """What was found.

    Attributes:
        questions: That were asked.
        answers: Different ones, each a chat.
        steps: Of all of them.
        good: Of these steps, those with a "+".
        right: Answers whose result is right.
    """

    questions: int
    answers: int
    steps: int
    good: int
    right: int


def make_steps(
    model: str | Path,
    data: Path,
    out: Path,
    *,
    benchmark: Benchmark,
    protocol: Protocol | None = None,
    plan: StepPlan | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> StepCounts:
    """Answer, go on from every step, and write what a critic learns from; a second call goes on.

    Args:
        model: Checkpoint that answers.
        data: Records with truths.
        out: Folder: `samples.jsonl` and `continuations.jsonl` with all answers, `steps.jsonl` with
            the chats, each with the ratio of right continuations of its steps, and `meta.json`.
        benchmark: Whose prompts and scores these are.
        protocol: Longest answer, tiles, precision; the benchmark's first unless given.
        plan: How many.
        device: "auto", "cpu", "cuda" or "cuda:1".
        threads: Of PyTorch; as it is set unless given.

    Raises:
        CheckpointError: The checkpoint cannot be had.
        SampleError: A record cannot be asked or scored.
        ConfigError: `out` was begun with other settings.
    """
    plan = plan or StepPlan()
    protocol = (protocol or benchmark.protocol).drawn(plan.drawing)
    asked = format_named(plan.format).of(benchmark)
    questions = asked.questions(data)
    with exclusive(out), resumable(out):
        subject = open_subject(model, protocol, device=device, threads=threads)
        settings = {**asdict(plan), "benchmark": benchmark.name, "model": subject.digest}
        begin(out / "steps.json", {**settings, "data": str(data.resolve())})
        drawn = draw_answers(
            subject, asked, protocol, questions, plan.samples, out / "samples.jsonl"
        )
        answers = [_different(found) for found in drawn]
        prefixes = _prefixes(answers)
        begun = [replace(questions[number], answer_start=start) for number, start in prefixes]
        continued = draw_answers(
            subject, asked, protocol, begun, plan.continuations, out / "continuations.jsonl"
        )
        ratios = {
            prefix: sum((one.score or 0) > RIGHT for one in found) / len(found)
            for prefix, found in zip(prefixes, continued, strict=True)
        }
        chats = [
            _chat(asked, protocol, question, number, answer, ratios, plan.threshold)
            for number, (question, found) in enumerate(zip(questions, answers, strict=True))
            for answer in found
        ]
        _write(out, data, chats)
    marks = [turn["value"] for chat in chats for turn in chat["conversations"][2::2]]
    return StepCounts(
        questions=len(questions),
        answers=len(chats),
        steps=len(marks),
        good=marks.count(GOOD),
        right=sum((one.score or 0) > RIGHT for found in answers for one in found),
    )


def _different(answers: Sequence[Prediction]) -> list[Prediction]:
    """Answers of different texts that have a step."""
    return [one for one in {a.text.strip(): a for a in answers}.values() if split_steps(one.text)]


def _prefixes(answers: Sequence[Sequence[Prediction]]) -> list[_Prefix]:
    """Every beginning of every answer up to a step that is not its last, once."""
    found: dict[_Prefix, None] = {}
    for number, some in enumerate(answers):
        for answer in some:
            steps = split_steps(answer.text)
            found.update(((number, joined(steps[:n])), None) for n in range(1, len(steps)))
    return list(found)


def _chat(
    benchmark: Benchmark,
    protocol: Protocol,
    question: Question,
    number: int,
    answer: Prediction,
    ratios: Mapping[_Prefix, float],
    threshold: float,
) -> dict[str, Any]:
    """An answer as a critic's chat."""
    steps = split_steps(answer.text)
    found = [ratios[number, joined(steps[:n])] for n in range(1, len(steps))]
    found.append(float((answer.score or 0) > RIGHT))
    marks = [GOOD if ratio > threshold else BAD for ratio in found]
    image = question.record.get("image")
    return {
        "id": f"{question.sample.record_id}-{answer.draw}",
        **({} if image is None else {"image": image}),
        "conversations": as_conversations(
            critic_turns(benchmark.prompt(question, protocol), steps, marks)
        ),
        "right_continuations": found,
        "kind": question.kind,
    }


def _write(out: Path, data: Path, chats: Sequence[dict[str, Any]]) -> None:
    if not chats:
        raise SampleError(f"{out}: every answer is empty; ask a model that answers")
    write_whole(out / "steps.jsonl", "".join(map(to_line, chats)))
    root = os.path.relpath(data.parent, out)
    meta = {"steps": {"root": root, "annotation": "steps.jsonl", "length": len(chats)}}
    write_whole(out / META, json.dumps(meta, indent=2))
