"""The training loop: one stage, one process or several, from a checkpoint to a checkpoint.

Rules set what is trainable; micro-batches are read by index; the loss is a sum over label weights
over the global weight of the step, so that accumulation and data parallelism change nothing; states
are saved atomically, and a killed run goes on to the same numbers. What is minimised, how processes
share a model and where states are kept are behind protocols: `Objective`, `Parallelism`,
`Checkpointing`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mono_internvl.compute import ComputePlan, default_attention, make_plan
from mono_internvl.data.batches import Batch, BatchPlan, BatchStream, read_ahead
from mono_internvl.data.encoder import RecordEncoder
from mono_internvl.data.order import mix
from mono_internvl.data.packed import PackedStream
from mono_internvl.data.skipped import QUARANTINE_FILE, SkipCounts, quarantine
from mono_internvl.data.sources import read_meta
from mono_internvl.distributed import (
    barrier,
    from_first,
    gathered,
    own_device,
    rank,
    world_size,
)
from mono_internvl.errors import TrainingStateError
from mono_internvl.released.weight_files import digest_of_checkpoint
from mono_internvl.runs.folder import exclusive
from mono_internvl.training.checkpointing import (
    Checkpointing,
    RunState,
    load_checkpoint,
    save_finished,
    sweep,
)
from mono_internvl.training.objectives.objective import LossOf
from mono_internvl.training.optimizer import optimizer_of
from mono_internvl.training.parallel import Parallel, Parallelism, local_value, parallelism_of
from mono_internvl.training.progress import StageProgress
from mono_internvl.training.recipe import Stage
from mono_internvl.training.recompute import compile_layers, enable_recompute
from mono_internvl.training.rules import apply_rules
from mono_internvl.training.state import (
    SavedState,
    check_resumable,
    digest_of_data,
    read_state,
    truncate_metrics,
)
from mono_internvl.training.state_folders import StateFolders
from mono_internvl.training.watching import (
    BAD_STEPS_FILE,
    OwedFlops,
    SourceLosses,
    StepGuard,
    Watch,
    attended_pairs,
    bad_step_error,
    finite_row,
    note_bad_step,
    peak_flops,
    rates_of,
    watchers,
)

LOSS = "loss"
"""Of the scalars of a step, the one that is minimised."""


@dataclass(frozen=True)
class StageResult:
    """A finished stage.

    Attributes:
        checkpoint: Folder in the released layout, processor included.
        metrics: JSON lines, one per step.
        steps: Optimizer steps in total.
        resumed_at: Step it was resumed at; 0 if it ran through, `steps` if it was done before.
    """

    checkpoint: Path
    metrics: Path
    steps: int
    resumed_at: int


def train_stage(
    stage: Stage,
    start: Path,
    data: Path,
    run: Path,
    *,
    device: str = "cpu",
    attention: str | None = None,
    plan: ComputePlan | None = None,
    parallel: Parallel = "ddp",
    parallelism: Parallelism | None = None,
    watch: Sequence[Watch] = (),
    checkpointing: Callable[[Path], Checkpointing] | None = None,
) -> StageResult:
    """Train one stage; go on where a killed run of the same stage stopped.

    Args:
        stage: What to do.
        start: Checkpoint to start from (or a folder or hub id that `from_pretrained` takes).
        data: Folder that `stage.data` is relative to.
        run: Output folder: `checkpoint/`, `metrics.jsonl`, and `step_*` states while it runs.
        device: "cpu", "cuda" (one GPU for each process) or "cuda:1".
        attention: Attention implementation; the plan's unless given.
        plan: What to compute with where the stage says "auto"; made here unless given. A run that
            goes on keeps the precision it began with.
        parallel: How processes share the model.
        parallelism: Another way than those with a name.
        watch: Who is told of every step beside `metrics.jsonl`.
        checkpointing: Where states are kept, made of `run`; `StateFolders` unless given.

    Raises:
        RecipeError: The rules do not fit the model.
        SampleError: A bad record, or where the stage skips them too many of them.
        TrainingStateError: The folder holds a run of another stage, begun from another checkpoint
            or on other data, or is in use; the disk is full, or the loss is not finite.
    """
    with ExitStack() as stack:
        if rank() == 0:
            stack.enter_context(exclusive(run))
            sweep(run)
        barrier()
        keeping = StateFolders(run, stage.keep_last, stage.keep_every)
        loop = _Loop(
            stage,
            start,
            data,
            run,
            own_device(device),
            attention,
            plan,
            parallelism or parallel,
            checkpointing(run) if checkpointing else keeping,
        )
        with loop.saving():
            return loop.train(watch)


@dataclass(frozen=True)
class StepTime:
    """What a step costs.

    Attributes:
        cpu_s: CPU seconds, all threads of the process.
        wall_s: Wall seconds.
    """

    cpu_s: float
    wall_s: float


def time_steps(
    stage: Stage, start: Path, data: Path, plan: ComputePlan, *, steps: int = 4
) -> StepTime:
    """Take the first steps of a stage in this process, time them and keep nothing.

    Args:
        stage: What is to be trained.
        start: Checkpoint to start from.
        data: Folder that `stage.data` is relative to.
        plan: What to compute with.
        steps: How many; the first is not counted, the median of the others is.

    Raises:
        RecipeError: The rules do not fit the model.
        SampleError: A bad record.
    """
    with tempfile.TemporaryDirectory() as run:
        folder, device = Path(run), own_device(plan.device)
        keeping = StateFolders(folder)
        loop = _Loop(stage, start, data, folder, device, None, plan, "ddp", keeping)
        return loop.time(steps)


class _Loop:
    """One run of one stage; the state of `train_stage`."""

    def __init__(
        self,
        stage: Stage,
        start: Path,
        data: Path,
        run: Path,
        device: str,
        attention: str | None,
        plan: ComputePlan | None,
        parallelism: Parallelism | Parallel,
        checkpointing: Checkpointing,
    ):
        self.checkpointing = checkpointing
        self.sources = read_meta(data / stage.data)
        num_records = sum(round(len(source) * source.repeat) for source in self.sources)
        self.run, self.device = run, device
        self.final, self.metrics = run / "checkpoint", run / "metrics.jsonl"
        self.quarantine = run / QUARANTINE_FILE
        found = read_state(self.final) if self.final.exists() else checkpointing.latest()
        precision = _precision(stage, found, plan, device)
        if isinstance(parallelism, str):
            parallelism = parallelism_of(parallelism, precision)
        self.parallelism = parallelism
        self.stage = stage = dataclasses.replace(stage.resolved(num_records), precision=precision)
        self.fields = json.loads(json.dumps(dataclasses.asdict(stage)))
        self.inputs = {"data content": digest_of_data(data / stage.data, self.sources)}
        if (begun_from := digest_of_checkpoint(Path(start))) is not None:
            self.inputs["start checkpoint"] = begun_from
        self.resumed = found
        if found is not None:
            check_resumable(found, run, self.fields, self.inputs)
        if device == "cpu" and stage.precision == "bf16":
            # oneDNN compiles its bf16 products for every shape and by default keeps 1,024 of them;
            # batches differ in length, so that a long run would keep gigabytes.
            os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        if attention is None and plan is not None:
            attention = plan.with_precision(precision).attention
        attention = attention or default_attention(device, precision)
        if self.resumed and self.resumed.folder != self.final:
            model, self.processor = checkpointing.load_model(self.resumed, attention)
        else:
            folder = self.final if self.resumed else start
            model, self.processor = load_checkpoint(folder, attention)
        self.model = model.to(device)
        self.reference = None
        if stage.objective.needs_reference:
            self.reference = load_checkpoint(start, attention)[0].to(device).eval()
            self.reference.requires_grad_(False)
        if stage.recompute != "none":
            enable_recompute(self.model, stage.recompute)
        if stage.compiling != "none":
            compile_layers(self.model)
        self.carried = stage.objective.initial_state()
        skipped = self.resumed.skipped if self.resumed else {}
        self.skipped = SkipCounts.from_dict(skipped, stage.max_skipped_ratio)
        guard = self.resumed.guard if self.resumed else {}
        self.guard = StepGuard.from_dict(guard, stage.max_loss_ratio)
        self.bad_steps = run / BAD_STEPS_FILE
        self.owed: OwedFlops | None = None

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within, an error waits for the state that is being written: it may be gone on from."""
        try:
            yield
        except BaseException:
            with suppress(TrainingStateError):
                self.checkpointing.wait()
            raise

    def train(self, watch: Sequence[Watch] = ()) -> StageResult:
        """See `train_stage`."""
        stage = self.stage
        first = self.resumed.step if self.resumed else 0
        result = StageResult(self.final, self.metrics, stage.steps, first)
        if first == stage.steps:
            self.checkpointing.clear()
            return result
        groups = apply_rules(self.model, self.model.config, stage)
        loss_of = self.parallelism.wrap(self._loss_of())  # may exchange the parameters
        optimizer = optimizer_of(self.model, groups, self.stage)
        if self.resumed:
            self.carried = self.checkpointing.restore(
                self.resumed, self.model, optimizer, self.carried
            )
        if peak_flops(self.device) is not None:
            learned = {name for group in groups for name in group.names}
            self.owed = OwedFlops.of(self.model.config, learned)
        if rank() == 0:
            for file in (self.metrics, self.quarantine, self.bad_steps):
                truncate_metrics(file, first)
        self.model.train()
        with (
            StageProgress(stage, first, quiet=rank() != 0) as progress,
            self.metrics.open("a") if rank() == 0 else nullcontext() as log,
            watchers(watch if rank() == 0 else (), self.run, first, self.fields) as told,
        ):
            steps = self._steps(first)
            for step in range(first, stage.steps):
                row = self._step(step, loss_of, optimizer, steps)
                if log is not None:
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                for one in told:
                    one.write(row)
                progress.update(row)
                done = step + 1
                is_due = stage.checkpoint_every and done % stage.checkpoint_every == 0
                if is_due and done < stage.steps:
                    if log is not None:
                        os.fsync(log.fileno())
                    self.checkpointing.save(self._state(done, optimizer))
        self.checkpointing.wait()
        save_finished(self.final, self._state(stage.steps, None))
        self.checkpointing.clear()
        barrier()
        return result

    def time(self, steps: int) -> StepTime:
        """See `time_steps`."""
        groups = apply_rules(self.model, self.model.config, self.stage)
        optimizer = optimizer_of(self.model, groups, self.stage)
        self.model.train()
        loss_of, batches = self._loss_of(), self._steps(0)
        cpu, wall = [], []
        for step in range(min(steps, self.stage.steps)):
            began = time.process_time()
            wall.append(self._step(step, loss_of, optimizer, batches)["seconds"])
            cpu.append(time.process_time() - began)
        return StepTime(*(statistics.median(found[1:] or found) for found in (cpu, wall)))

    def _loss_of(self) -> LossOf:
        return LossOf(self.model, self.stage.objective, self.reference)

    def _steps(self, first_step: int) -> Iterator[Sequence[Batch]]:
        """The micro-batches of each step, in order."""
        stage = self.stage
        plan = BatchPlan(
            batch_size=stage.batch_size,
            accumulation=stage.accumulation,
            max_tokens=stage.max_tokens,
            pad_token_id=self.model.config.text_config.pad_token_id or 0,
            image_token_id=self.processor.image_token_id,
            rank=rank(),
            world_size=world_size(),
            loss_weighting=stage.loss_weighting,
            on_bad_sample=stage.on_bad_sample,
            num_steps=stage.steps,
            is_paired=stage.objective.reads_pairs,
        )
        self.processor.image_processor.decoding = stage.decoding
        encode = RecordEncoder(self.processor, stage.max_tiles)
        if stage.packing != "none":
            packed = PackedStream(self.sources, encode, plan, stage.packed_tokens, stage.seed)
            yield from read_ahead(packed, range(first_step, stage.steps), stage.loader_workers)
            return
        stream = BatchStream(self.sources, encode, plan, stage.seed)
        numbers = range(first_step * stage.accumulation, stage.steps * stage.accumulation)
        batches = read_ahead(stream, numbers, stage.loader_workers)
        while micro := list(islice(batches, stage.accumulation)):
            yield micro

    def _step(
        self,
        step: int,
        loss_of: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterator[Sequence[Batch]],
    ) -> dict[str, Any]:
        """One optimizer step; returns its metrics row."""
        stage, began = self.stage, time.perf_counter()
        micro = next(batches)
        torch.manual_seed(mix(stage.seed, step, rank()))  # dropout, too, is a function of the step
        all_sum = self.parallelism.all_sum
        losses = SourceLosses(len(self.sources))
        total = torch.stack([batch.loss_weight.sum() for batch in micro]).sum()
        weight, *of_sources = all_sum(torch.cat((total[None], losses.weights(micro)))).unbind()
        found: dict[str, list[Tensor]] = {}
        for index, batch in enumerate(micro):
            is_last = index == len(micro) - 1
            with nullcontext() if is_last else self.parallelism.no_sync(loss_of):
                scalars = self._backward(loss_of, batch, weight / world_size(), losses)
            for name in sorted(scalars):  # in the same order in every process
                found.setdefault(name, []).append(scalars[name])
        means = {n: all_sum(torch.stack(of).sum()) / world_size() for n, of in found.items()}
        rate_ratio = stage.rate_ratio(step)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_rate"] * rate_ratio
        trainable = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in trainable:
            if parameter.grad is None:  # a step without images counts as a zero gradient
                parameter.grad = torch.zeros_like(parameter)
        norm = local_value(nn.utils.clip_grad_norm_(trainable, stage.clip_norm))
        sums = torch.zeros(0) if losses.sums is None else all_sum(losses.sums)
        device = found[LOSS][0].device
        single = torch.stack([*means.values(), norm.to(device), *found[LOSS]])
        # The only time in a step that the host waits for the device.
        read = torch.cat((single, sums.to(device))).tolist()
        read, lost = read[: len(single)], read[len(single) :]
        logged, (grad_norm, *own) = dict(zip(means, read, strict=False)), read[len(means) :]
        loss = logged.pop(LOSS)
        row = {**logged, "step": step + 1, LOSS: loss, "learning_rate_share": rate_ratio}
        row["grad_norm"] = grad_norm
        if why := self.guard.judge(loss, grad_norm):
            row["bad_step"] = why
            ids = note_bad_step(self.bad_steps, row, micro, own)
            if stage.on_bad_step == "stop" or self.guard.is_lost:
                raise bad_step_error(stage.name, row, ids, self.bad_steps)
        else:
            optimizer.step()
            self.carried = stage.objective.next_state(self.carried, logged)
        optimizer.zero_grad(set_to_none=True)
        of_each = zip(self.sources, lost, torch.stack(of_sources).tolist(), strict=False)
        row["losses"] = {source.name: loss / w for source, loss, w in of_each if w}
        row |= self._count(step, micro)
        seconds = time.perf_counter() - began
        rates = rates_of(row, self._shape, seconds, self.owed, self.device)
        return {**finite_row(row), **rates, "seconds": seconds}

    def _count(self, step: int, micro: Sequence[Batch]) -> dict[str, int]:
        """What all processes read in a step; stops a run that leaves too much of it out."""
        own = [record for batch in micro for record in batch.skipped]
        tokens, images, num_good, num_bad, rows, *self._shape = self.parallelism.all_sum(
            torch.tensor(
                [
                    sum(batch.num_tokens for batch in micro),
                    sum(batch.num_images for batch in micro),
                    sum(len(batch.record_ids) for batch in micro),
                    len(own),
                    sum(bool(batch.record_ids) for batch in micro),
                    sum(batch.routing.num_visual for batch in micro),
                    sum(batch.labelled.rows.numel() for batch in micro),
                    sum(attended_pairs(batch) for batch in micro),
                ]
            )
        ).tolist()
        if num_bad:  # the same in every process: all of them say theirs
            skipped = [record for said in gathered(own) for record in said]
            self.skipped.note(skipped, quiet=rank() != 0)
            if rank() == 0:
                quarantine(self.quarantine, step + 1, skipped)
        self.skipped.add(num_good + num_bad, num_bad)
        self.skipped.check(self.quarantine if rank() == 0 else None)
        counts = {"tokens": tokens, "images": images, "skipped": num_bad}
        return counts if self.stage.packing == "none" else {**counts, "rows": rows}

    def _backward(
        self, loss_of: nn.Module, batch: Batch, denominator: Tensor, losses: SourceLosses
    ) -> dict[str, Tensor]:
        """Add up the gradients of a micro-batch; returns its loss and logged scalars, unread."""
        device = torch.device(self.device)
        here = losses.weighing(batch.to(device))
        denominator = denominator.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.stage.precision == "bf16"):
            loss, scalars = loss_of(here, denominator, self.carried)
        loss.backward()
        losses.add(here, denominator)
        return {name: value.detach().float() for name, value in {**scalars, LOSS: loss}.items()}

    def _state(self, step: int, optimizer: torch.optim.Optimizer | None) -> RunState:
        return RunState(
            model=self.model,
            processor=self.processor,
            optimizer=optimizer,
            objective=self.carried,
            step=step,
            stage=self.fields,
            inputs=self.inputs,
            skipped=self.skipped.to_dict(),
            guard=self.guard.to_dict(),
        )


def _precision(
    stage: Stage, begun: SavedState | None, plan: ComputePlan | None, device: str
) -> Any:
    """The stage's precision in every process alike: asked for, kept from a state, or the plan's."""
    if stage.precision != "auto":
        return stage.precision
    if begun is not None and "precision" in begun.stage:
        return begun.stage["precision"]
    precision = (plan or make_plan(device)).precision if rank() == 0 else ""
    return from_first(precision)
