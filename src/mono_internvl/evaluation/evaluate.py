"""`mono-internvl evaluate`: ask a checkpoint the records of a file and score what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mono_internvl.checkpoints.loading import load_planned, plan_inference
from mono_internvl.compute import ComputePlan
from mono_internvl.errors import ConfigError, SampleError
from mono_internvl.evaluation.journal import AnswerJournal, key_of
from mono_internvl.evaluation.metrics import mean_score, score
from mono_internvl.evaluation.prompts import PromptEncoder
from mono_internvl.evaluation.runner import (
    ask_all,
    mean_scores,
    read_questions,
    write_predictions,
)
from mono_internvl.generation.context import most_tokens
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.released.keys import read_config
from mono_internvl.released.weight_files import resolve_checkpoint
from mono_internvl.runs.json_lines import read_lines
from mono_internvl.training.state import digest_of_start


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        scores: Score of every kind (`metrics.mean_score`), 0 to 1.
        items: Records of every kind.
        is_blind: Whether the images were hidden.
        predictions: File with every answer.
        plan: What it was computed with, as `ComputePlan.to_dict` gives it.
    """

    scores: dict[str, float]
    items: dict[str, int]
    is_blind: bool
    predictions: Path
    plan: dict[str, Any]


def evaluate(
    model: str | Path,
    data: Path,
    *,
    blind: bool = False,
    device: str = "auto",
    out: Path | None = None,
    per_kind: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 96,
    max_tiles: int | None = None,
    precision: str = "auto",
    attention: str | None = None,
    threads: int | None = None,
    on_plan: Callable[[ComputePlan], None] | None = None,
) -> Evaluation:
    """Score a checkpoint on JSON lines whose records carry a `kind` and its true answer.

    Records, their lengths and `out` are looked at before anything is asked. Answers are kept as
    they are made: after a kill the same call goes on with the questions that are left.

    Args:
        model: Checkpoint folder or hub id.
        data: Records; image paths are relative to the file's folder.
        blind: Hide the images: what remains is what the questions give away.
        device: "auto", "cpu", "cuda" or "cuda:1".
        out: File for the predictions; beside the checkpoint or, for a hub id, here unless given.
        per_kind: Only the first so many of each kind.
        batch_size: Most prompts at a time; fewer where they are long.
        max_new_tokens: Longest answer.
        max_tiles: Most tiles per image; the processor's own unless given.
        precision: "bf16" autocasts over fp32 weights, "fp32" does not, "int8" has int8 weights;
            "auto" is the one that the machine multiplies faster, or int8 where fp32 weights do not
            fit in memory.
        attention: Attention implementation; the plan's unless given.
        threads: Of PyTorch; as it is set unless given.
        on_plan: Told what is computed with, before the model is loaded.

    Raises:
        CheckpointError: The checkpoint cannot be had.
        SampleError: A record is malformed, too long or cannot be scored; or, when all others are
            answered, its image is damaged.
        ConfigError: Device or precision is unknown, or `out` cannot be written.
    """
    for field, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{field}={value!r}; expected an integer >= 1")
    folder = resolve_checkpoint(model)
    plan = plan_inference(
        folder,
        device=device,
        precision=precision,
        attention=attention,
        threads=threads,
        autocasts=True,
    )
    if on_plan is not None:
        on_plan(plan)
    questions = read_questions(data, per_kind=per_kind)
    processor = MonoInternVLProcessor.from_pretrained(folder)
    encoder = PromptEncoder(processor, most_tokens(read_config(folder)), max_new_tokens, max_tiles)
    for question in questions:
        encoder.check_text(question.prompt, question.sample.where)
    name = f"predictions-{data.stem}{'-blind' if blind else ''}.jsonl"
    file = out or (Path(model) / name if Path(model).is_dir() else Path(name))
    settings = {
        "model": digest_of_start(folder),
        "blind": blind,
        "max_new_tokens": max_new_tokens,
        "max_tiles": max_tiles,
        "precision": plan.precision,
    }
    journal = AnswerJournal(file, settings)
    keys = [key_of(question) for question in questions]
    refused: list[SampleError] = []
    for outcomes in ask_all(
        load_planned(folder, plan, autocasts=True),
        processor,
        questions,
        blind=blind,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        max_tiles=max_tiles,
        precision=plan.precision,
        known={number for number, key in enumerate(keys) if key in journal.answers},
    ):
        refused += [outcome for outcome in outcomes.values() if isinstance(outcome, SampleError)]
        journal.add({keys[n]: text for n, text in outcomes.items() if isinstance(text, str)})
    predictions = [
        question.predict(journal.answers[key], blind)
        for question, key in zip(questions, keys, strict=True)
        if key in journal.answers
    ]
    write_predictions(file, predictions)
    if refused:
        raise SampleError(
            f"{len(refused)} of {len(questions)} records could not be asked, first {refused[0]}; "
            f"{file} holds the answers to the others, which another call does not ask again"
        )
    journal.close()
    means = mean_scores(predictions)
    return Evaluation(
        scores={kind: mean for kind, (mean, _) in means.items()},
        items={kind: count for kind, (_, count) in means.items()},
        is_blind=blind,
        predictions=file,
        plan=plan.to_dict(),
    )


def rescore(predictions: Path) -> dict[str, float]:
    """Score of every kind from a predictions file, without a model.

    Raises:
        SampleError: A line is not a prediction.
    """
    by_kind: dict[str, list[dict[str, Any]]] = {}
    try:
        lines = read_lines(predictions)
    except (OSError, ValueError) as error:
        raise SampleError(f"{predictions}: not a readable predictions file ({error})") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["score"] = score(row, row["prediction"])
            by_kind.setdefault(row["kind"], []).append(row)
        except (ValueError, KeyError, TypeError) as error:
            raise SampleError(f"{predictions}:{number}: not a prediction ({error!r})") from error
    return {kind: mean_score(rows) for kind, rows in by_kind.items()}
