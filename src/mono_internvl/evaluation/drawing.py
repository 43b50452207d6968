"""Several answers to each question, kept on disk: for pairs, for steps, and to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mono_internvl.checkpoints.loading import plan_inference
from mono_internvl.errors import ConfigError
from mono_internvl.evaluation.benchmark import Benchmark
from mono_internvl.evaluation.prompts import PromptEncoder
from mono_internvl.evaluation.protocol import Protocol
from mono_internvl.evaluation.questions import Question
from mono_internvl.evaluation.runner import Subject, ask
from mono_internvl.generation.context import most_tokens
from mono_internvl.released.weight_files import resolve_checkpoint
from mono_internvl.runs.predictions import Prediction, read_predictions


def open_subject(
    model: str | Path, protocol: Protocol, *, device: str = "auto", threads: int | None = None
) -> Subject:
    """A checkpoint that is asked, on the plan of this machine.

    Raises:
        CheckpointError: The checkpoint cannot be had.
        ConfigError: Device or precision is unknown.
    """
    folder = resolve_checkpoint(model)
    plan = plan_inference(
        folder,
        device=device,
        precision=protocol.precision,
        attention=protocol.attention,
        threads=threads,
        autocasts=True,
    )
    return Subject.load(folder, plan)


def draw_answers(
    subject: Subject,
    benchmark: Benchmark,
    protocol: Protocol,
    questions: Sequence[Question],
    count: int,
    out: Path,
) -> list[tuple[Prediction, ...]]:
    """So many answers to each question; those that `out` holds already are not drawn again.

    Args:
        subject: Who is asked.
        benchmark: Whose questions these are.
        protocol: With a `drawing`.
        questions: What is asked.
        count: Answers to each.
        out: File of all answers, those to a question one after another.

    Returns:
        The answers, question by question.

    Raises:
        SampleError: A record cannot be asked.
        ConfigError: `count` is below 1, or `out` holds answers to something else.
    """
    if count < 1:
        raise ConfigError(f"samples={count}; expected at least 1")
    encoder = PromptEncoder(subject.processor, most_tokens(subject.model.config), protocol)
    for question in questions:
        encoder.check_text(benchmark.prompt(question, protocol), question.sample.where)
    drawn = [draw for question in questions for draw in question.draws(count)]
    if out.exists():
        found = read_predictions(out)
        wanted = [(question.record, question.draw) for question in drawn]
        if wanted != [(one.record, one.draw) for one in found]:
            raise ConfigError(f"{out}: holds other answers; delete it, or choose another folder")
        again = f"delete {out}, or choose another folder"
        for one in found[:1]:
            protocol.planned(subject.plan).check_same(one.protocol, str(out), again)
    else:
        found = ask(subject, benchmark, protocol, drawn, out=out)
    return [tuple(found[first : first + count]) for first in range(0, len(found), count)]
