"""Batches of a training stage: the n-th one is a function of n, whoever asks and whenever.

Legend: B samples, T tokens (padded to the longest), S tile side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mono_internvl.configuration.labels import IGNORED_LABEL
from mono_internvl.data.order import Mixture, batch_positions
from mono_internvl.data.records import MOST_CHARACTERS_OF_TOKEN, Record, count_characters
from mono_internvl.data.sources import Source
from mono_internvl.errors import (
    ImageError,
    MonoInternVLError,
    PromptError,
    RecipeError,
    SampleError,
)
from mono_internvl.experts.routing import KeptRows, Routing
from mono_internvl.processing.encoding import Sample

LossWeighting = Literal["token", "square", "sample"]
OnBadSample = Literal["raise", "skip"]

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


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process.

    Attributes:
        input_ids: (B, T) int64, right-padded; causal attention never looks right, so no mask.
        labels: (B, T) int64, -100 where nothing is learnt and at padding; unshifted.
        loss_weight: (B, T) fp32, 0 where nothing is learnt.
        pixel_values: (tiles, 3, S, S) fp32 of all samples in order, or None without images.
        routing: Which of the B * T rows are visual, known to the host.
        labelled: Which of them have a label to predict, known to the host.
        num_tokens: Tokens that are not padding.
        num_images: Images.
        record_ids: Of the samples, in order.
        skipped: The records left out (`on_bad_sample="skip"`).
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

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`; nothing waits until they are there."""
        pixels = self.pixel_values
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            loss_weight=self.loss_weight.to(device, non_blocking=True),
            pixel_values=None if pixels is None else pixels.to(device, non_blocking=True),
            routing=self.routing.to(device),
            labelled=self.labelled.to(device),
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
        # A process without any sample could not take part in the step: the records that follow
        # stand in, so what they are is still a function of `number` alone.
        stand_ins = range(positions[-1] + 1, positions[-1] + 1 + _MOST_STAND_INS)
        for tried, position in enumerate(chain(positions, stand_ins)):
            if samples and tried >= len(positions):
                break
            source, index = self.mixture.locate(position)
            try:
                record = self.sources[source].record(index)
                samples.append(self._encode(record))
                ids.append(record.record_id)
            except SampleError as error:
                if plan.on_bad_sample == "raise":
                    raise
                skipped.append(Skipped(self.sources[source].name, error.reason, str(error)))
        if not samples:
            raise SampleError(
                f"micro-batch {number}: all {len(skipped)} records are bad, first: "
                f"{skipped[0].message}"
            )
        return self._collate(samples, tuple(ids), tuple(skipped))

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

    def _encode(self, record: Record) -> Sample:
        num_characters = count_characters(record.turns)
        if num_characters > self.plan.max_tokens * MOST_CHARACTERS_OF_TOKEN:
            raise SampleError(
                f"{record.where}: {num_characters:,} characters are more than max_tokens="
                f"{self.plan.max_tokens} can hold; shorten the record, or skip bad samples",
                reason="too long",
            )
        try:
            sample = self.encode(record)
        except ImageError as error:
            raise SampleError(f"{record.where}: {error}", reason="image damaged") from error
        except PromptError as error:
            raise SampleError(f"{record.where}: {error}", reason="prompt refused") from error
        if len(sample.input_ids) > self.plan.max_tokens:
            raise SampleError(
                f"{record.where}: {len(sample.input_ids)} tokens, more than max_tokens="
                f"{self.plan.max_tokens}; raise max_tokens, lower max_tiles, or skip bad samples",
                reason="too long",
            )
        if not (sample.labels != IGNORED_LABEL).any():
            raise SampleError(
                f"{record.where}: no answer token to learn from", reason="nothing to learn"
            )
        return sample

    def _collate(
        self,
        samples: list[Sample],
        record_ids: tuple[str, ...],
        skipped: tuple[Skipped, ...],
    ) -> Batch:
        longest = max(len(sample.input_ids) for sample in samples)
        shape = (len(samples), longest)
        input_ids = torch.full(shape, self.plan.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORED_LABEL, dtype=torch.int64)
        weight = torch.zeros(shape)
        exponent = _EXPONENT[self.plan.loss_weighting]
        for row, sample in enumerate(samples):
            length = len(sample.input_ids)
            input_ids[row, :length] = sample.input_ids
            labels[row, :length] = sample.labels
            labels[row, 0] = IGNORED_LABEL  # nothing predicts the first token
            learnt = labels[row] != IGNORED_LABEL
            weight[row, learnt] = float(learnt.sum()) ** -exponent
        pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
        routing = Routing.from_mask(input_ids == self.plan.image_token_id)
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
        )


def read_ahead(stream: BatchStream, numbers: range, workers: int) -> Iterator[Batch]:
    """The micro-batches of some numbers, in order.

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


class _Outcomes(Dataset[Batch | MonoInternVLError]):
    """A stream whose errors are values: what a worker raises arrives wrapped in its traceback."""

    def __init__(self, stream: BatchStream):
        self.stream = stream

    def __getitem__(self, number: int) -> Batch | MonoInternVLError:
        try:
            return self.stream[number]
        except MonoInternVLError as error:
            return error
