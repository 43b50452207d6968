"""Several published benchmarks in one evaluation: asked first, scored afterwards.

What is said lies in `predictions/NAME.jsonl` of the output folder before anything is scored, so
that scoring can be done again, with another judge or elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mono_internvl.checkpoints.loading import plan_inference
from mono_internvl.compute import ComputePlan
from mono_internvl.distributed import barrier, process_group, rank
from mono_internvl.errors import ConfigError, SampleError
from mono_internvl.evaluation.benchmarks.published import PublishedBenchmark
from mono_internvl.evaluation.benchmarks.table import TABLE
from mono_internvl.evaluation.data_files import digest_of
from mono_internvl.evaluation.families import ROTATION, Judge
from mono_internvl.evaluation.journal import remove_journals
from mono_internvl.evaluation.prompts import PromptEncoder
from mono_internvl.evaluation.protocol import Protocol
from mono_internvl.evaluation.runner import BATCH_SIZE, Subject, ask
from mono_internvl.evaluation.submissions import write_submission
from mono_internvl.generation.context import most_tokens
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.video import FrameSampling
from mono_internvl.released.keys import read_config
from mono_internvl.released.weight_files import resolve_checkpoint
from mono_internvl.runs.benchmark_results import BenchmarkResult, write_results
from mono_internvl.runs.folder import write_whole
from mono_internvl.runs.predictions import Prediction, read_predictions

Progress = Callable[[str, int, int], None]
"""Told a benchmark's name, how many questions this process is through with, and of how many."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is asked of whom; can be handed to other processes.

    Attributes:
        model: Checkpoint folder or hub id.
        names: Of benchmarks in the table.
        data_root: Folder of their data.
        out: Folder of predictions, results and submissions.
        device: "auto", "cpu", "cuda" or "cuda:1".
        precision: "auto", "bf16", "fp32" or "int8".
        attention: Attention implementation; by the plan unless given.
        threads: Of PyTorch; as it is set unless given.
        max_tiles: Most tiles of an image, instead of the benchmarks' own.
        limit: Only the first so many questions of each.
        batch_size: Most questions that are answered at a time.
        frames: Of a video, instead of the benchmarks' own.
        fps: Frames a second instead.

    Raises:
        ConfigError: Frames are asked for, but no benchmark has videos; or they make no sense.
    """

    model: str
    names: tuple[str, ...]
    data_root: Path
    out: Path
    device: str = "auto"
    precision: str = "auto"
    attention: str | None = None
    threads: int | None = None
    max_tiles: int | None = None
    limit: int | None = None
    batch_size: int = BATCH_SIZE
    frames: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        is_asked = self.frames is not None or self.fps is not None
        if is_asked and all(row.frames is None for row in self.rows):
            raise ConfigError(
                f"frames={self.frames}, fps={self.fps}: {', '.join(self.names)} asks about no "
                "video; leave them out"
            )

    @property
    def rows(self) -> list[PublishedBenchmark]:
        """The benchmarks."""
        rows = [TABLE[name] for name in self.names]
        if self.frames is None and self.fps is None:
            return rows
        sampling = FrameSampling(self.frames, self.fps)
        return [row if row.frames is None else replace(row, frames=sampling) for row in rows]

    def predictions(self, row: PublishedBenchmark) -> Path:
        """The file of a benchmark's answers."""
        return self.out / "predictions" / f"{row.name}.jsonl"

    def protocol(self, row: PublishedBenchmark) -> Protocol:
        """How a benchmark is asked here."""
        return row.protocol.changed(
            attention=self.attention, max_tiles=self.max_tiles, precision=self.precision
        )


def ask_suite(
    suite: Suite,
    on_plan: Callable[[ComputePlan], None] | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Ask all questions; under a process group with all its processes. Goes on after a kill.

    All data are read, and all texts measured, before the model is loaded.

    Raises:
        CheckpointError: The checkpoint cannot be had.
        ConfigError: Device or precision is unknown, or `out` cannot be written.
        SampleError: Data are missing or damaged; or, when all others are answered, images are.
    """
    folder = resolve_checkpoint(suite.model)
    plan = plan_inference(
        folder,
        device=suite.device,
        precision=suite.precision,
        attention=suite.attention,
        threads=suite.threads,
        autocasts=True,
    )
    if on_plan is not None:
        on_plan(plan)
    files = {row.name: row.data_files(suite.data_root) for row in suite.rows}
    sets = {}
    processor = MonoInternVLProcessor.from_pretrained(folder)
    most = most_tokens(read_config(folder))
    for row in suite.rows:
        questions = row.load(files[row.name], suite.data_root)[: suite.limit]
        encoder = PromptEncoder(processor, most, suite.protocol(row))
        for question in questions:
            encoder.check_text(question.prompt, question.sample.where)
        sets[row.name] = questions
    with process_group():
        if rank() == 0:
            (suite.out / "predictions").mkdir(parents=True, exist_ok=True)
            for row in suite.rows:
                write_whole(_digest_file(suite, row), digest_of(files[row.name]))
        subject = Subject.load(folder, plan)
        failed = []
        for row in suite.rows:
            questions, through = sets[row.name], 0

            def report(count: int, name: str = row.name, total: int = len(questions)) -> None:
                nonlocal through
                through += count
                if on_progress is not None:
                    on_progress(name, through, total)

            try:
                ask(
                    subject,
                    row,
                    suite.protocol(row),
                    questions,
                    out=suite.predictions(row),
                    batch_size=suite.batch_size,
                    on_answers=report,
                    keeps_journal=True,
                )
            except SampleError as error:
                failed.append(f"{row.name}: {error}")
        if failed:
            raise SampleError("; ".join(failed))
        barrier()
        if rank() == 0:
            for row in suite.rows:
                remove_journals(suite.predictions(row))


def score_suite(
    suite: Suite, judge_for: Callable[[PublishedBenchmark], Judge | None] = lambda row: None
) -> list[BenchmarkResult]:
    """Score the answers on disk, write results and submission files.

    Args:
        suite: Whose.
        judge_for: The judge of a benchmark that needs one; None leaves its cell empty.

    Raises:
        SampleError: A benchmark has no answers, or a file of them is damaged.
        ConfigError: The judge does not answer.
    """
    results = [_result(suite, row, judge_for) for row in suite.rows]
    write_results(suite.out, suite.model, results)
    return results


def _result(
    suite: Suite,
    row: PublishedBenchmark,
    judge_for: Callable[[PublishedBenchmark], Judge | None],
) -> BenchmarkResult:
    file = suite.predictions(row)
    if not file.is_file():
        raise SampleError(f"{file}: no answers to {row.title}; ask first, without --score-only")
    found = read_predictions(file)
    if not found:
        raise SampleError(f"{file}: holds no answer; ask anew")
    judge = judge_for(row) if row.rules.needs_judge else None
    scores = row.score(found, judge)
    if row.submission:
        write_submission(row.submission, suite.out / "submissions", row.name, found)
    digest_file = _digest_file(suite, row)
    digest = digest_file.read_text(encoding="utf-8").strip() if digest_file.is_file() else None
    return BenchmarkResult(
        name=row.name,
        title=row.title,
        split=row.split,
        unit=row.unit,
        top=row.top,
        scores=scores.by_protocol(),
        details=scores.details,
        answered=len(found),
        questions=row.questions,
        protocol=found[0].protocol,
        data_md5=digest,
        judge=judge.name if judge is not None else None,
        notes=tuple(_notes(row, found, digest, scores.notes)),
        published=row.published,
    )


def _notes(
    row: PublishedBenchmark, found: Sequence[Prediction], digest: str | None, own: Sequence[str]
) -> list[str]:
    notes = list(own)
    truths = [one.record["truth"] for one in found]
    is_rotated = all("index" in truth and "options" in truth for truth in truths)
    num = len({truth["index"] % ROTATION for truth in truths}) if is_rotated else len(truths)
    if row.questions is not None and num != row.questions:
        notes.append(f"{num:,} questions, the published split has {row.questions:,}")
    asked = found[0].protocol or {}
    if any(one.protocol != found[0].protocol for one in found):
        notes.append("answers of several protocols in one file")
    if asked.get("max_tiles") != row.protocol.max_tiles:
        notes.append(f"{asked.get('max_tiles')} tiles instead of {row.protocol.max_tiles}")
    if row.md5 and digest and not digest.startswith(row.md5):
        notes.append(f"data of MD5 {digest[:8]}, published is {row.md5}")
    return [*notes, row.breakage] if row.breakage else notes


def _digest_file(suite: Suite, row: PublishedBenchmark) -> Path:
    return suite.out / "predictions" / f"{row.name}.data-md5"
