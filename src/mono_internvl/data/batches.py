"""Batches of a training stage: the n-th one is a function of n, whoever asks and whenever.

Legend: B samples, T tokens (padded to the longest), S tile side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mono_internvl.configuration.labels import IGNORED_LABEL
from mono_internvl.data.encoder import encode_checked
from mono_internvl.data.order import Mixture, batch_positions, mix
from mono_internvl.data.records import Record
from mono_internvl.data.sources import Source
from mono_internvl.errors import (
    MonoInternVLError,
    RecipeError,
    SampleError,
)
from mono_internvl.experts.routing import KeptRows, Routing
from mono_internvl.processing.encoding import Sample
from mono_internvl.processing.tiling import feature_order

LossWeighting = Literal["token", "square", "sample"]
OnBadSample = Literal["raise", "skip"]
Item = TypeVar("Item")

# How many records are tried in the place of a micro-batch whose own are all bad.
_MOST_STAND_INS = 64
# Exponent p of a sample's token weight 1 / x^p, x its labelled tokens.
_EXPONENT: dict[str, float] = {"token": 0.0, "square": 0.5, "sample": 1.0}


@dataclass(frozen=True)
class Skipped:
    """A record that was left out.

    Attributes:
        source: Name of its source.
        reason: As `SampleError` has it.
        message: What is wrong, beginning with `file:line:`.
    """

    source: str
    reason: str
    message: str

    @classmethod
    def of(cls, source: str, error: SampleError) -> Skipped:
        """A record of a source, by what was raised over it."""
        return cls(source, error.reason, str(error))


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process.

    Attributes:
        input_ids: (B, T) int64, right-padded; causal attention never looks right, so no mask. Of
            packed samples one row without padding, (1, T).
        labels: (B, T) int64, -100 where nothing is learnt and at padding; unshifted.
        loss_weight: (B, T) fp32, 0 where nothing is learnt.
        pixel_values: (tiles, 3, S, S) fp32 of all samples in order, or None without images.
        routing: Which of the B * T rows are visual, known to the host.
        labelled: Which of them have a label to predict, known to the host.
        num_tokens: Tokens that are not padding.
        num_images: Images.
        record_ids: Of the samples, in order.
        skipped: The records left out (`on_bad_sample="skip"`).
        feature_order: (visual tokens,) int64, which feature of the tiles stands at each; None where
            they stand tile after tile.
        position_ids: (B, T) int64, of packed samples: they start anew with every sample, and tokens
            of one attend to those of no other. None where each row is one sample.
        source_ids: (B, T) int64, the number of the source that each token is of; None where nobody
            asks.
        num_pairs: Of paired samples: so many rows with chosen answers, then as many with the
            rejected ones to the same questions, whose labels weigh 0. Both show the same tiles. 0
            where nothing is paired.
    """

    input_ids: Tensor
    labels: Tensor
    loss_weight: Tensor
    pixel_values: Tensor | None
    routing: Routing
    labelled: KeptRows
    num_tokens: int
    num_images: int
    record_ids: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()
    feature_order: Tensor | None = None
    position_ids: Tensor | None = None
    num_pairs: int = 0
    source_ids: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`; nothing waits until they are there."""
        pixels, order, positions = self.pixel_values, self.feature_order, self.position_ids
        sources = self.source_ids
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            loss_weight=self.loss_weight.to(device, non_blocking=True),
            pixel_values=None if pixels is None else pixels.to(device, non_blocking=True),
            routing=self.routing.to(device),
            labelled=self.labelled.to(device),
            feature_order=None if order is None else order.to(device, non_blocking=True),
            position_ids=None if positions is None else positions.to(device, non_blocking=True),
            source_ids=None if sources is None else sources.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class BatchPlan:
    """How the endless stream is cut.

    Attributes:
        batch_size: Samples of a step, over all processes and micro-batches.
        accumulation: Micro-batches of a step.
        rank, world_size: Which process asks, of how many. Neither these nor `accumulation` change
            which samples make up a step.
        max_tokens: Longest sample; a longer one is a bad sample.
        pad_token_id: Fills the right end of `input_ids`.
        image_token_id: Stands where an image feature is placed.
        loss_weighting: Weight of a label: "token" 1, "sample" 1/x, "square" 1/sqrt(x) for x labels.
        on_bad_sample: "raise" stops at the first, "skip" leaves it out and says so in the batch.
        window: Steps within which samples of like length are grouped.
        num_steps: Steps of the run. Its last window ends there, so that a run of whole epochs sees
            every record equally often.
        is_paired: Whether every record has to be a pair, and is read as one.
    """

    batch_size: int
    max_tokens: int
    pad_token_id: int
    image_token_id: int
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    loss_weighting: LossWeighting = "token"
    on_bad_sample: OnBadSample = "raise"
    window: int = 16
    num_steps: int | None = None
    is_paired: bool = False


class BatchStream(Dataset[Batch]):
    """Map-style view of the stream: `stream[n]` is the n-th micro-batch of this process.

    `read_ahead` reads a range of numbers in worker processes and still resumes exactly: the state
    is n.

    Args:
        sources: Where records come from.
        encode: A record to ids, labels and pixels.
        plan: How to cut.
        seed: Of the order.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encode: Callable[[Record], Sample],
        plan: BatchPlan,
        seed: int,
    ):
        if plan.batch_size % (plan.world_size * plan.accumulation):
            raise RecipeError(
                f"batch_size={plan.batch_size} is not a multiple of {plan.world_size} processes "
                f"times accumulation={plan.accumulation}; change one of them"
            )
        self.sources, self.encode, self.plan, self.seed = sources, encode, plan, seed
        self.mixture = Mixture(
            tuple(len(source) for source in sources), tuple(s.repeat for s in sources), seed
        )
        if not len(self.mixture):
            raise SampleError("an epoch has no record: raise repeat_time of the sources")
        self._window: tuple[int, list[list[int]]] = (-1, [])

    def __getitem__(self, number: int) -> Batch:
        plan = self.plan
        step, micro = divmod(number, plan.accumulation)
        window, place = divmod(step, plan.window)
        first = micro * plan.world_size + plan.rank
        every = plan.accumulation * plan.world_size
        positions = self._batches_of_window(window)[place][first::every]
        samples: list[Sample] = []
        skipped: list[Skipped] = []
        ids: list[str] = []
        sources: list[int] = []
        # A process without any sample could not take part in the step: the records that follow
        # stand in, so what they are is still a function of `number` alone.
        stand_ins = range(positions[-1] + 1, positions[-1] + 1 + _MOST_STAND_INS)
        for tried, position in enumerate(chain(positions, stand_ins)):
            if samples and tried >= len(positions):
                break
            source, index = self.mixture.locate(position)
            try:
                record = drawn(self.sources[source].record(index), self.seed, position)
                sample = encode_checked(self.encode, record, plan.max_tokens)
                if plan.is_paired and sample.rejected is None:
                    raise SampleError(
                        f"{record.where}: no pair, but this stage learns from pairs; give "
                        "`question`, `chosen` and `rejected`",
                        reason="no pair",
                    )
                samples.append(sample)
                ids.append(record.record_id)
                sources.append(source)
            except SampleError as error:
                if plan.on_bad_sample == "raise":
                    raise
                skipped.append(Skipped.of(self.sources[source].name, error))
        if not samples:
            raise SampleError(
                f"micro-batch {number}: all {len(skipped)} records are bad, first: "
                f"{skipped[0].message}"
            )
        batch = collate(samples, plan, tuple(ids), tuple(skipped))
        rows = torch.tensor(sources * (2 if batch.num_pairs else 1))
        return replace(batch, source_ids=rows[:, None].expand_as(batch.labels))

    def _batches_of_window(self, window: int) -> list[list[int]]:
        if self._window[0] != window:
            first = window * self.plan.window
            steps = self.plan.window
            if self.plan.num_steps is not None:
                steps = min(steps, self.plan.num_steps - first)
            start = first * self.plan.batch_size
            stop = start + steps * self.plan.batch_size
            where = (self.mixture.locate(p) for p in range(start, stop))
            sizes = [self.sources[source].size(index) for source, index in where]
            batches = batch_positions(sizes, window, start, self.plan.batch_size, self.seed)
            self._window = (window, batches)
        return self._window[1]


def collate(
    samples: Sequence[Sample],
    plan: BatchPlan,
    record_ids: tuple[str, ...],
    skipped: tuple[Skipped, ...],
) -> Batch:
    """Samples as rows of a micro-batch, padded on the right; of pairs, the chosen ones first."""
    others = [s.rejected for s in samples if s.rejected is not None] if plan.is_paired else []
    rows = [*samples, *others]
    shape = (len(rows), max(len(sample.input_ids) for sample in rows))
    input_ids = torch.full(shape, plan.pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED_LABEL, dtype=torch.int64)
    weight = torch.zeros(shape)
    for row, sample in enumerate(rows):
        length = len(sample.input_ids)
        input_ids[row, :length] = sample.input_ids
        labels[row, :length], weight[row, :length] = _labels_and_weight(sample, plan)
    weight[len(samples) :] = 0
    batch = _batch(samples, plan, input_ids, labels, weight, record_ids, skipped)
    if not others:
        return batch
    order = batch.feature_order
    if order is None:  # the tiles are read once: every feature stands in two rows
        order = torch.arange(batch.routing.num_visual // 2)
    return replace(
        batch,
        num_tokens=sum(len(sample.input_ids) for sample in rows),
        num_pairs=len(samples),
        feature_order=None if batch.pixel_values is None else torch.cat((order, order)),
    )


def collate_packed(
    samples: Sequence[Sample],
    plan: BatchPlan,
    record_ids: tuple[str, ...],
    skipped: tuple[Skipped, ...],
) -> Batch:
    """Samples one behind the other in one row; without any, a row that nothing is learnt from.

    Every process takes part in every micro-batch, so that one for which no sample is left gets such
    a row.
    """
    if not samples:
        idle = torch.full((1, 1), plan.pad_token_id, dtype=torch.int64)
        no_label = torch.full_like(idle, IGNORED_LABEL)
        return _batch([], plan, idle, no_label, torch.zeros(1, 1), record_ids, skipped)
    parts = [_labels_and_weight(sample, plan) for sample in samples]
    batch = _batch(
        samples,
        plan,
        torch.cat([sample.input_ids for sample in samples])[None],  # (1, T)
        torch.cat([labels for labels, _ in parts])[None],
        torch.cat([weight for _, weight in parts])[None],
        record_ids,
        skipped,
    )
    positions = torch.cat([torch.arange(len(sample.input_ids)) for sample in samples])
    return replace(batch, position_ids=positions[None])


def _labels_and_weight(sample: Sample, plan: BatchPlan) -> tuple[Tensor, Tensor]:
    """Labels of a sample and their weights, (T,) each; nothing predicts the first token."""
    labels = sample.labels.clone()
    labels[0] = IGNORED_LABEL
    learnt = labels != IGNORED_LABEL
    weight = torch.zeros(len(labels))
    weight[learnt] = float(learnt.sum()) ** -_EXPONENT[plan.loss_weighting]
    return labels, weight


def _batch(
    samples: Sequence[Sample],
    plan: BatchPlan,
    input_ids: Tensor,
    labels: Tensor,
    weight: Tensor,
    record_ids: tuple[str, ...],
    skipped: tuple[Skipped, ...],
) -> Batch:
    pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    routing = Routing.from_mask(input_ids == plan.image_token_id)
    return Batch(
        input_ids,
        labels,
        weight,
        torch.cat(pixels) if pixels else None,
        routing,
        KeptRows.labelled(labels, routing),
        num_tokens=sum(len(sample.input_ids) for sample in samples),
        num_images=sum(len(sample.num_tiles) for sample in samples),
        record_ids=record_ids,
        skipped=skipped,
        feature_order=feature_order([layout for sample in samples for layout in sample.layouts]),
    )


def drawn(record: Record, seed: int, position: int) -> Record:
    """A record with what its augmentation is drawn from, if its images are augmented."""
    if record.augmentation is None:
        return record
    return replace(record, augmentation=mix(seed, position))


def read_ahead(stream: Dataset[Item], numbers: Sequence[int], workers: int) -> Iterator[Item]:
    """The items of some numbers, in order: micro-batches, or steps of packed ones.

    Args:
        stream: Where they come from.
        numbers: Which of them.
        workers: Processes that read ahead; 0 reads here.

    Raises:
        SampleError: As the stream raised it, in whichever process.
    """
    outcomes = DataLoader(_Outcomes(stream), batch_size=None, sampler=numbers, num_workers=workers)
    for outcome in outcomes:
        if isinstance(outcome, MonoInternVLError):
            raise outcome
        yield outcome


class _Outcomes(Dataset[Any]):
    """A stream whose errors are values: what a worker raises arrives wrapped in its traceback."""

    def __init__(self, stream: Dataset[Any]):
        self.stream = stream

    def __getitem__(self, number: int) -> Any:
        try:
            return self.stream[number]
        except MonoInternVLError as error:
            return error
