"""`mono-internvl evaluate`: ask a checkpoint the questions of a benchmark and score its answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mono_internvl.checkpoints.loading import plan_inference
from mono_internvl.compute import ComputePlan
from mono_internvl.distributed import process_group
from mono_internvl.errors import ConfigError
from mono_internvl.evaluation.benchmark import Benchmark
from mono_internvl.evaluation.benchmarks.records import RECORDS
from mono_internvl.evaluation.prompts import PromptEncoder
from mono_internvl.evaluation.protocol import Protocol
from mono_internvl.evaluation.questions import first_of_each_kind
from mono_internvl.evaluation.runner import BATCH_SIZE, Subject, ask
from mono_internvl.generation.context import most_tokens
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.released.keys import read_config
from mono_internvl.released.weight_files import resolve_checkpoint


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        benchmark: Its name.
        protocol: How it was asked, as `Protocol.to_dict` gives it.
        scores: Score of every kind (`Metric.mean`), 0 to 1.
        items: Records of every kind.
        is_blind: Whether the images were hidden.
        predictions: File with every answer.
        plan: What it was computed with, as `ComputePlan.to_dict` gives it.
    """

    benchmark: str
    protocol: dict[str, Any]
    scores: dict[str, float]
    items: dict[str, int]
    is_blind: bool
    predictions: Path
    plan: dict[str, Any]


def evaluate(
    model: str | Path,
    data: Path,
    *,
    benchmark: Benchmark = RECORDS,
    protocol: Protocol | None = None,
    blind: bool = False,
    device: str = "auto",
    out: Path | None = None,
    per_kind: int | None = None,
    batch_size: int = BATCH_SIZE,
    threads: int | None = None,
    on_plan: Callable[[ComputePlan], None] | None = None,
) -> Evaluation:
    """Score a checkpoint on a benchmark; under `torchrun`, with all its processes.

    Records, their lengths and `out` are looked at before anything is asked. Answers are kept as
    they are made: after a kill the same call goes on with the questions that are left.

    Args:
        model: Checkpoint folder or hub id.
        data: Of the benchmark.
        benchmark: Questions, prompts and scores; anybody's own records unless given.
        protocol: How it is asked; the benchmark's first unless given. Precision "auto" is the one
            that the machine multiplies faster, or int8 where fp32 weights do not fit in memory;
            "bf16" autocasts over fp32 weights.
        blind: Hide the images: what remains is what the questions give away.
        device: "auto", "cpu", "cuda" or "cuda:1".
        out: File for the predictions; beside the checkpoint or, for a hub id, here unless given.
        per_kind: Only the first so many of each kind.
        batch_size: Most prompts at a time; fewer where they are long.
        threads: Of PyTorch; as it is set unless given.
        on_plan: Told what is computed with, before the model is loaded.

    Raises:
        CheckpointError: The checkpoint cannot be had.
        SampleError: A record is malformed, too long or cannot be scored; or, when all others are
            answered, its image is damaged.
        ConfigError: Device or precision is unknown, or `out` cannot be written.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size={batch_size!r}; expected an integer >= 1")
    protocol = benchmark.protocol if protocol is None else protocol
    folder = resolve_checkpoint(model)
    plan = plan_inference(
        folder,
        device=device,
        precision=protocol.precision,
        attention=protocol.attention,
        threads=threads,
        autocasts=True,
    )
    if on_plan is not None:
        on_plan(plan)
    questions = first_of_each_kind(benchmark.questions(data), per_kind)
    processor = MonoInternVLProcessor.from_pretrained(folder)
    encoder = PromptEncoder(processor, most_tokens(read_config(folder)), protocol)
    for question in questions:
        encoder.check_text(benchmark.prompt(question, protocol), question.sample.where)
    if blind:
        questions = [question.without_images() for question in questions]
    of = re.sub(r"[^\w.+-]+", "_", data.stem)  # it may be a pattern of shards
    name = f"predictions-{of}{'-blind' if blind else ''}.jsonl"
    file = out or (Path(model) / name if Path(model).is_dir() else Path(name))
    with process_group():
        subject = Subject.load(folder, plan)
        found = ask(subject, benchmark, protocol, questions, out=file, batch_size=batch_size)
    means = benchmark.mean_scores(found)
    return Evaluation(
        benchmark=benchmark.name,
        protocol=protocol.planned(plan).to_dict(),
        scores={kind: mean.score for kind, mean in means.items()},
        items={kind: mean.items for kind, mean in means.items()},
        is_blind=blind,
        predictions=file,
        plan=plan.to_dict(),
    )
