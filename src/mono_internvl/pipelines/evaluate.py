"""`mono-internvl evaluate`: ask a checkpoint the records of a file and score what it says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from mono_internvl.compute import choose_device
from mono_internvl.errors import ConfigError, SampleError
from mono_internvl.evaluation.metrics import score
from mono_internvl.evaluation.run import (
    answer_all,
    mean_scores,
    read_questions,
    write_predictions,
)
from mono_internvl.model.blocked_attention import BLOCKED
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.model.processing import MonoInternVLProcessor
from mono_internvl.model.weight_files import resolve_checkpoint


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        scores: Mean score of every kind, 0 to 1.
        items: Records of every kind.
        is_blind: Whether the images were hidden.
        predictions: File with every answer.
    """

    scores: dict[str, float]
    items: dict[str, int]
    is_blind: bool
    predictions: Path


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
    precision: str = "bf16",
) -> Evaluation:
    """Score a checkpoint on JSON lines whose records carry a `kind` and its true answer.

    Args:
        model: Checkpoint folder or hub id.
        data: Records; image paths are relative to the file's folder.
        blind: Hide the images: what remains is what the questions give away.
        device: "auto", "cpu", "cuda" or "cuda:1".
        out: File for the predictions; beside the checkpoint or, for a hub id, here unless given.
        per_kind: Only the first so many of each kind.
        batch_size: Prompts at a time.
        max_new_tokens: Longest answer.
        max_tiles: Most tiles per image; the processor's own unless given.
        precision: "bf16" autocasts over fp32 weights, "fp32" does not.

    Raises:
        CheckpointError: The checkpoint cannot be had.
        SampleError: A record is malformed or cannot be scored.
        ConfigError: Device or precision is unknown.
    """
    if precision not in ("bf16", "fp32"):
        raise ConfigError(f"precision={precision!r}; expected bf16 or fp32")
    place, folder = choose_device(device), resolve_checkpoint(model)
    questions = read_questions(data, per_kind=per_kind)
    processor = MonoInternVLProcessor.from_pretrained(folder)
    # In bf16 a CPU is slow with sdpa.
    attention = BLOCKED if place.type == "cpu" else None
    loaded = MonoInternVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    predictions = answer_all(
        loaded.to(place),
        processor,
        questions,
        blind=blind,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        max_tiles=max_tiles,
        precision=precision,
    )
    name = f"predictions-{data.stem}{'-blind' if blind else ''}.jsonl"
    file = out or (Path(model) / name if Path(model).is_dir() else Path(name))
    write_predictions(file, predictions)
    means = mean_scores(predictions)
    return Evaluation(
        scores={kind: mean for kind, (mean, _) in means.items()},
        items={kind: count for kind, (_, count) in means.items()},
        is_blind=blind,
        predictions=file,
    )


def rescore(predictions: Path) -> dict[str, float]:
    """Mean score of every kind from a predictions file, without a model.

    Raises:
        SampleError: A line is not a prediction.
    """
    by_kind: dict[str, list[float]] = {}
    for number, line in enumerate(predictions.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            by_kind.setdefault(row["kind"], []).append(score(row, row["prediction"]))
        except (ValueError, KeyError, TypeError) as error:
            raise SampleError(f"{predictions}:{number}: not a prediction ({error!r})") from error
    return {kind: sum(scores) / len(scores) for kind, scores in by_kind.items()}
