"""`mono-internvl data pairs`: a model's own answers, right beside wrong, to learn from.

Answers to each question are drawn and scored by the benchmark's own rules. A right and a wrong one
are a pair, unless the wrong one contains the right result; an answer in which no result is found is
paired apart. Without truths there is Dropout-NTP: the true answer against one that begins with its
first half and goes on without the image.

Source: `tools/reasoning_data_pipeline` of OpenGVLab/InternVL at 2410d1d: limits, entailment,
    sampling, half of the words.
Differs: right and wrong are what the benchmark scores. There, for document questions, the distance
    of two texts is taken for their likeness, so that any other answer counts as right.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mono_internvl.errors import ConfigError, SampleError
from mono_internvl.evaluation.answer_formats import AnswerFormat, format_named
from mono_internvl.evaluation.benchmark import Benchmark
from mono_internvl.evaluation.drawing import draw_answers, open_subject
from mono_internvl.evaluation.protocol import Drawing, Protocol
from mono_internvl.evaluation.questions import Question
from mono_internvl.evaluation.runner import Subject
from mono_internvl.processing.prompts import IMAGE_PLACEHOLDER, Turn
from mono_internvl.runs.folder import begin, exclusive, resumable, write_whole
from mono_internvl.runs.json_lines import to_line
from mono_internvl.runs.predictions import Prediction

SAMPLES, PER_QUESTION = 32, 15
DRAWING = Drawing(temperature=0.7, top_k=50)
RIGHT = 0.9
"""Of its score, what a right answer is above."""
KEPT_RATIO = 0.5
"""Of the words of the true answer, what Dropout-NTP goes on from."""
META = "meta.json"
_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


@dataclass(frozen=True)
class PairCounts:
    """What became of the questions.

    Attributes:
        questions: That were asked.
        right: Answers that are right.
        wrong: That are not.
        unreadable: In which no result is found.
        without: Questions without any pair: all of their answers are right, or none is.
        pairs: Written, by file.
    """

    questions: int
    right: int
    wrong: int
    unreadable: int
    without: int
    pairs: dict[str, int]


@dataclass(frozen=True)
class PairPlan:
    """How pairs are made.

    Attributes:
        samples: Answers that are drawn to each question.
        per_question: Most pairs of a question, in each file.
        format: Where an answer's result stands, a name of `FORMATS`.
        dropout: Whether Dropout-NTP pairs are made, too.
        drawing: How answers are drawn.

    Raises:
        ConfigError: A number is out of range, or there is no such format.
    """

    samples: int = SAMPLES
    per_question: int = PER_QUESTION
    format: str = "whole"
    dropout: bool = False
    drawing: Drawing = DRAWING

    def __post_init__(self) -> None:
        for name in ("samples", "per_question"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}; expected an integer >= 1")
        format_named(self.format)


def make_pairs(
    model: str | Path,
    data: Path,
    out: Path,
    *,
    benchmark: Benchmark,
    protocol: Protocol | None = None,
    plan: PairPlan | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> PairCounts:
    """Draw answers of a checkpoint and write pairs of them; a second call goes on.

    Args:
        model: Checkpoint folder or hub id.
        data: Records with truths.
        out: Folder: `samples.jsonl` with all answers, `correctness.jsonl`, `format.jsonl` and
            `dropout.jsonl` with pairs, and `meta.json`, which a stage trains on.
        benchmark: Whose prompts and scores these are.
        protocol: Longest answer, tiles, precision; the benchmark's first unless given.
        plan: How many, of which form.
        device: "auto", "cpu", "cuda" or "cuda:1".
        threads: Of PyTorch; as it is set unless given.

    Raises:
        CheckpointError: The checkpoint cannot be had.
        SampleError: A record cannot be asked or scored, or no pair is found.
        ConfigError: `out` was begun with other settings.
    """
    plan = plan or PairPlan()
    protocol = (protocol or benchmark.protocol).drawn(plan.drawing)
    form = format_named(plan.format)
    asked = form.of(benchmark)
    questions = asked.questions(data)
    with exclusive(out), resumable(out):
        subject = open_subject(model, protocol, device=device, threads=threads)
        settings = {**asdict(plan), "benchmark": benchmark.name, "model": subject.digest}
        begin(out / "pairs.json", {**settings, "data": str(data.resolve())})
        drawn = draw_answers(
            subject, asked, protocol, questions, plan.samples, out / "samples.jsonl"
        )
        files: dict[str, list[dict[str, Any]]] = {"correctness": [], "format": []}
        sorts = []
        for question, answers in zip(questions, drawn, strict=True):
            prompt = asked.prompt(question, protocol)
            sorts.append(sort := _Sorted.of(answers, form))
            for name, found in (("correctness", sort.pairs()), ("format", sort.format_pairs())):
                chosen = _some(found, plan.per_question, question)
                files[name] += [_pair(question, prompt, n, *one) for n, one in enumerate(chosen)]
        if plan.dropout:
            files["dropout"] = _dropout_pairs(subject, asked, protocol, questions, out)
        _write(out, data, files)
    return PairCounts(
        questions=len(questions),
        right=sum(sort.num_right for sort in sorts),
        wrong=sum(sort.num_wrong for sort in sorts),
        unreadable=sum(sort.num_unreadable for sort in sorts),
        without=sum(not sort.pairs() and not sort.format_pairs() for sort in sorts),
        pairs={name: len(found) for name, found in files.items()},
    )


@dataclass(frozen=True)
class _Sorted:
    """The answers to a question, each text once, with its result.

    Attributes:
        right: Texts and results that are right; likewise wrong ones.
        unreadable: Texts without a result.
        num_right: Answers, repeated ones too; likewise the others.
    """

    right: tuple[tuple[str, str], ...]
    wrong: tuple[tuple[str, str], ...]
    unreadable: tuple[str, ...]
    num_right: int
    num_wrong: int
    num_unreadable: int

    @classmethod
    def of(cls, answers: Iterable[Prediction], form: AnswerFormat) -> _Sorted:
        right: list[tuple[str, str]] = []
        wrong: list[tuple[str, str]] = []
        unreadable: list[str] = []
        for answer in answers:
            text, found = answer.text.strip(), form.extract(answer.text)
            if found is None:
                unreadable.append(text)
            else:
                (right if (answer.score or 0) > RIGHT else wrong).append((text, found))
        return cls(
            tuple(dict.fromkeys(right)),
            tuple(dict.fromkeys(wrong)),
            tuple(text for text in dict.fromkeys(unreadable) if text),
            len(right),
            len(wrong),
            len(unreadable),
        )

    def pairs(self) -> list[tuple[str, str]]:
        """A right and a wrong text, whose result does not contain the right one."""
        return [
            (good, bad)
            for good, result in self.right
            for bad, other in self.wrong
            if result.lower() not in other.lower()
        ]

    def format_pairs(self) -> list[tuple[str, str]]:
        """A right text and one without a result."""
        return [(good, bad) for good, _ in self.right for bad in self.unreadable]


def _some(pairs: Sequence[tuple[str, str]], most: int, question: Question) -> list[Any]:
    """At most so many, drawn by the question alone."""
    if len(pairs) <= most:
        return list(pairs)
    return random.Random(question.seed()).sample(list(pairs), most)


def _pair(
    question: Question, prompt: Sequence[Turn], number: int, chosen: str, rejected: str
) -> dict[str, Any]:
    """A pair as a record."""
    image = question.record.get("image")
    return {
        "id": f"{question.sample.record_id}-{number}",
        **({} if image is None else {"image": image}),
        "conversations": as_conversations(prompt),
        "chosen": chosen,
        "rejected": rejected,
        "kind": question.kind,
    }


def as_conversations(turns: Iterable[Turn]) -> list[dict[str, str]]:
    """Turns as a record has them, a placeholder for each image."""
    return [
        {
            "from": _ROLES[turn.role],
            "value": "".join(p if isinstance(p, str) else IMAGE_PLACEHOLDER for p in turn.parts),
        }
        for turn in turns
    ]


def _dropout_pairs(
    subject: Subject,
    benchmark: Benchmark,
    protocol: Protocol,
    questions: Sequence[Question],
    out: Path,
) -> list[dict[str, Any]]:
    """The true answer against its first half with what the model adds to it without the image."""
    begun: list[tuple[Question, Question]] = []
    for question in questions:
        words = question.sample.turns[-1].text.split(" ")
        kept = " ".join(words[: int(KEPT_RATIO * len(words))])
        if kept.strip() and question.sample.images:
            turns = tuple(_without_images(turn) for turn in question.sample.turns)
            sample = replace(question.sample, turns=turns)
            begun.append((question, Question(sample, answer_start=kept)))
    if not begun:
        return []
    blind = [one for _, one in begun]
    drawn = draw_answers(subject, benchmark, protocol, blind, 1, out / "dropout-samples.jsonl")
    pairs = []
    for (question, _), (answer,) in zip(begun, drawn, strict=True):
        truth, said = question.sample.turns[-1].text, answer.text
        if said.strip() and said.strip() != truth.strip():
            prompt = benchmark.prompt(question, protocol)
            pairs.append(_pair(question, prompt, 0, truth, said))
    return pairs


def _without_images(turn: Turn) -> Turn:
    return Turn(turn.role, (turn.text.lstrip("\n"),))


def _write(out: Path, data: Path, files: dict[str, list[dict[str, Any]]]) -> None:
    """The files of pairs that hold any, and the meta file that names them."""
    if not any(files.values()):
        raise SampleError(
            f"{out}: no pair among the answers: to every question all are right, or none is; draw "
            "more samples, or ask other questions"
        )
    root = os.path.relpath(data.parent, out)
    meta = {}
    for name, pairs in files.items():
        if pairs:
            file = out / f"{name}.jsonl"
            write_whole(file, "".join(map(to_line, pairs)))
            meta[name] = {"root": root, "annotation": file.name, "length": len(pairs)}
    write_whole(out / META, json.dumps(meta, indent=2))
