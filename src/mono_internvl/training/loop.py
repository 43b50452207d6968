"""The training loop: one stage, one process or several, from a checkpoint to a checkpoint.

Rules set what learns; micro-batches are read by number; the loss is a sum over label weights over
the global weight of the step, so that accumulation and data parallelism change nothing; states
are saved atomically, and a killed run goes on to the same numbers.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mono_internvl.compute import ComputePlan, default_attention, make_plan
from mono_internvl.data.batches import Batch, BatchPlan, BatchStream, read_ahead
from mono_internvl.data.order import mix
from mono_internvl.data.samples import Sample
from mono_internvl.data.sources import read_meta
from mono_internvl.errors import TrainingStateError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.runs.folder import exclusive
from mono_internvl.training.distributed import (
    all_sum,
    barrier,
    from_first,
    own_device,
    rank,
    world_size,
)
from mono_internvl.training.progress import StageProgress
from mono_internvl.training.recipe import Stage
from mono_internvl.training.recompute import enable_recompute
from mono_internvl.training.rules import LearnedGroup, apply_rules
from mono_internvl.training.skipped import SkipCounts
from mono_internvl.training.state import (
    SavedState,
    digest_of_data,
    digest_of_start,
    latest_state,
    load_optimizer,
    read_state,
    remove_state,
    save_state,
    state_folder,
    state_folders,
    sweep,
    truncate_metrics,
)

logger = logging.getLogger(__name__)

_DEFAULTS = {"recompute": "none"}
"""Fields of a stage that were added later, with what held before."""
_LIMITS = ("max_skipped_ratio",)
"""Fields that say when a run stops and not what it computes: it may go on with others."""


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
        return _Loop(stage, start, data, run, own_device(device), attention, plan).train()


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
        loop = _Loop(stage, start, data, Path(run), own_device(plan.device), None, plan)
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
    ):
        self.sources = read_meta(data / stage.data)
        num_records = sum(round(len(source) * source.repeat) for source in self.sources)
        self.run, self.device = run, device
        self.final, self.metrics = run / "checkpoint", run / "metrics.jsonl"
        found = read_state(self.final) if self.final.exists() else latest_state(self.run)
        precision = _precision(stage, found, plan, device)
        self.stage = stage = dataclasses.replace(stage.resolved(num_records), precision=precision)
        self.fields = json.loads(json.dumps(dataclasses.asdict(stage)))
        self.inputs = {
            "data content": digest_of_data(
                data / stage.data, [source.path for source in self.sources]
            )
        }
        if (begun_from := digest_of_start(Path(start))) is not None:
            self.inputs["start checkpoint"] = begun_from
        self.resumed = self._resumable(found)
        if device == "cpu" and stage.precision == "bf16":
            # oneDNN compiles its bf16 products for every shape and by default keeps 1,024 of them;
            # batches differ in length, so that a long run would keep gigabytes.
            os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        if attention is None and plan is not None:
            attention = plan.with_precision(precision).attention
        attention = attention or default_attention(device, precision)
        folder = self.resumed.folder if self.resumed else start
        self.model: MonoInternVLForConditionalGeneration = (
            MonoInternVLForConditionalGeneration.from_pretrained(
                folder, dtype=torch.float32, attn_implementation=attention
            )
        ).to(device)
        if self.resumed:
            _own_memory(self.model)
        if stage.recompute != "none":
            enable_recompute(self.model, stage.recompute)
        self.processor: MonoInternVLProcessor = MonoInternVLProcessor.from_pretrained(folder)
        skipped = self.resumed.skipped if self.resumed else {}
        self.skipped = SkipCounts.from_dict(skipped, stage.max_skipped_ratio)

    def _resumable(self, state: SavedState | None) -> SavedState | None:
        # A field that is younger than the state had its default.
        begun = {**_DEFAULTS, **state.stage} if state is not None else self.fields
        names = (set(begun) | set(self.fields)) - set(_LIMITS)
        changed = [name for name in sorted(names) if begun.get(name) != self.fields.get(name)]
        if changed:
            name = changed[0]
            raise TrainingStateError(
                f"{self.run}: holds a run with {name}={begun.get(name)!r}, this stage has "
                f"{self.fields.get(name)!r}; choose another output folder or delete this one"
            )
        if state is not None and state.step > self.stage.steps:
            raise TrainingStateError(
                f"{state.folder}: a state after {state.step} steps of a stage of "
                f"{self.stage.steps}; delete it to go on from an earlier one, or to start over"
            )
        for name, digest in self.inputs.items():
            if state is not None and state.inputs.get(name, digest) != digest:
                raise TrainingStateError(
                    f"{self.run}: holds a run begun with another {name} (digest "
                    f"{state.inputs[name]}, now {digest}); restore it, choose another output "
                    "folder or delete this one"
                )
        return state

    def train(self) -> StageResult:
        stage = self.stage
        first = self.resumed.step if self.resumed else 0
        result = StageResult(self.final, self.metrics, stage.steps, first)
        if first == stage.steps:
            self._remove_states_but(self.final)
            return result
        groups = apply_rules(self.model, self.model.config, stage)
        optimizer = optimizer_of(self.model, groups, self.stage)
        if self.resumed:
            load_optimizer(self.resumed.folder, self.model, optimizer)
        if rank() == 0:
            truncate_metrics(self.metrics, first)
        self.model.train()
        learner = self._data_parallel()
        with (
            StageProgress(stage, first, quiet=rank() != 0) as progress,
            self.metrics.open("a") if rank() == 0 else nullcontext() as log,
        ):
            batches = self._batches(first)
            for step in range(first, stage.steps):
                row = self._step(step, learner, optimizer, batches)
                if log is not None:
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                progress.update(row)
                done = step + 1
                is_due = stage.checkpoint_every and done % stage.checkpoint_every == 0
                if is_due and done < stage.steps:
                    if log is not None:
                        os.fsync(log.fileno())
                    self._save(state_folder(self.run, done), optimizer, done)
        self._save(self.final, None, stage.steps)
        return result

    def time(self, steps: int) -> StepTime:
        """See `time_steps`."""
        groups = apply_rules(self.model, self.model.config, self.stage)
        optimizer = optimizer_of(self.model, groups, self.stage)
        self.model.train()
        learner, batches = _LossOf(self.model), self._batches(0)
        cpu, wall = [], []
        for step in range(min(steps, self.stage.steps)):
            began = time.process_time()
            wall.append(self._step(step, learner, optimizer, batches)["seconds"])
            cpu.append(time.process_time() - began)
        return StepTime(*(statistics.median(found[1:] or found) for found in (cpu, wall)))

    def _data_parallel(self) -> nn.Module:
        learner = _LossOf(self.model)
        if world_size() == 1:
            return learner
        # A batch without images leaves the visual experts of this process unused.
        return DistributedDataParallel(
            learner, find_unused_parameters=True, gradient_as_bucket_view=True
        )

    def _batches(self, first_step: int) -> Iterator[Batch]:
        stage = self.stage
        plan = BatchPlan(
            batch_size=stage.batch_size,
            accumulation=stage.accumulation,
            max_tokens=stage.max_tokens,
            pad_token_id=self.model.config.text_config.pad_token_id or 0,
            rank=rank(),
            world_size=world_size(),
            loss_weighting=stage.loss_weighting,
            on_bad_sample=stage.on_bad_sample,
            num_steps=stage.steps,
        )
        stream = BatchStream(self.sources, self._encode, plan, stage.seed)
        numbers = range(first_step * stage.accumulation, stage.steps * stage.accumulation)
        return read_ahead(stream, numbers, stage.loader_workers)

    def _encode(self, sample: Sample) -> Any:
        max_tiles = sample.max_tiles or self.stage.max_tiles
        return self.processor.encode_conversation(sample.messages, max_tiles=max_tiles)

    def _step(
        self,
        step: int,
        learner: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterator[Batch],
    ) -> dict[str, Any]:
        """One optimizer step; returns its metrics row."""
        stage, began = self.stage, time.perf_counter()
        micro = [next(batches) for _ in range(stage.accumulation)]
        torch.manual_seed(mix(stage.seed, step, rank()))  # dropout, too, is a function of the step
        weight = all_sum(torch.stack([batch.loss_weight.sum() for batch in micro]).sum())
        losses = []
        for number, batch in enumerate(micro):
            waits: AbstractContextManager[None] = nullcontext()
            if isinstance(learner, DistributedDataParallel) and number < stage.accumulation - 1:
                waits = learner.no_sync()
            with waits:
                losses.append(self._backward(learner, batch, weight / world_size()))
        loss = all_sum(torch.stack(losses).sum()) / world_size()
        share = stage.rate_share(step)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_rate"] * share
        learned = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in learned:
            if parameter.grad is None:  # a step without images counts as a zero gradient
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.clip_grad_norm_(learned, stage.clip_norm)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            ids = ", ".join(i for batch in micro for i in batch.record_ids)
            raise TrainingStateError(
                f"stage {stage.name!r}: loss {loss.item()} and gradient norm {norm.item()} at step "
                f"{step + 1} (records {ids}); lower the learning rate or look at these records"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        counts = self._count(micro)
        return {
            "step": step + 1,
            "loss": loss.item(),
            "learning_rate_share": share,
            "grad_norm": norm.item(),
            **counts,
            "seconds": time.perf_counter() - began,
        }

    def _count(self, micro: Sequence[Batch]) -> dict[str, int]:
        """What all processes read in a step; stops a run that leaves too much of it out."""
        skipped = [record for batch in micro for record in batch.skipped]
        self.skipped.note(skipped)
        tokens, images, num_good, num_bad = all_sum(
            torch.tensor(
                [
                    sum(batch.num_tokens for batch in micro),
                    sum(batch.num_images for batch in micro),
                    sum(len(batch.record_ids) for batch in micro),
                    len(skipped),
                ]
            )
        ).tolist()
        self.skipped.add(num_good + num_bad, num_bad)
        self.skipped.check()
        return {"tokens": tokens, "images": images, "skipped": num_bad}

    def _backward(self, learner: nn.Module, batch: Batch, denominator: Tensor) -> Tensor:
        device = torch.device(self.device)
        pixels = batch.pixel_values
        with torch.autocast(device.type, torch.bfloat16, enabled=self.stage.precision == "bf16"):
            loss: Tensor = learner(
                input_ids=batch.input_ids.to(device),
                pixel_values=None if pixels is None else pixels.to(device),
                labels=batch.labels.to(device),
                loss_weight=batch.loss_weight.to(device),
                num_items_in_batch=denominator.to(device),
            )
        loss.backward()
        return loss.detach().cpu()

    def _save(self, folder: Path, optimizer: torch.optim.Optimizer | None, step: int) -> None:
        if rank() == 0:
            save_state(
                folder,
                self.model,
                self.processor,
                optimizer,
                step,
                self.fields,
                self.inputs,
                self.skipped.to_dict(),
            )
        self._remove_states_but(folder)
        barrier()

    def _remove_states_but(self, kept: Path) -> None:
        if rank() == 0:
            for folder in state_folders(self.run):
                if folder != kept:
                    remove_state(folder)


def _own_memory(model: nn.Module) -> None:
    """Copy weights that are views of files: a state is deleted while its weights are used."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()


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


def optimizer_of(
    model: nn.Module, groups: Sequence[LearnedGroup], stage: Stage
) -> torch.optim.Optimizer:
    """AdamW over the groups that learn, at their peak rates.

    Args:
        model: Its parameters are looked up by name.
        groups: What `apply_rules` gives.
        stage: Its moments are taken.
    """
    parameters = dict(model.named_parameters())
    return torch.optim.AdamW(
        [
            {
                "params": [parameters[name] for name in group.names],
                "lr": group.learning_rate,
                "peak_rate": group.learning_rate,
                "weight_decay": group.weight_decay,
            }
            for group in groups
        ],
        betas=stage.betas,
        eps=stage.eps,
        fused=True,
    )


class _LossOf(nn.Module):
    """A model as a function from a batch to its loss.

    The loss is tied, with weight 0, to one parameter that learns: a batch of text in a stage where
    only visual parameters learn has a backward pass too, in which every process takes part.
    """

    def __init__(self, model: MonoInternVLForConditionalGeneration):
        super().__init__()
        self.model = model
        self._tie = [next(p for p in model.parameters() if p.requires_grad)]

    def forward(self, **batch: Any) -> Tensor:
        loss: Tensor = self.model(**batch, logits_to_keep=None).loss
        return loss + 0.0 * self._tie[0].flatten()[0]
