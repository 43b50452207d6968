"""Packed steps of a training stage: the n-th one is a function of n, whoever asks and whenever.

The samples of a step are `batch_size` in a row of the endless stream. Their lengths are known from
the shards' indexes, or counted (texts tokenized, headers of images read); all of them are packed
into rows, and the rows are dealt out to the processes, the fullest first. So a step has the same
samples in the same rows for any number of processes and readers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import Dataset

from mono_internvl.data.batches import Batch, BatchPlan, Skipped, collate_packed, drawn
from mono_internvl.data.encoder import (
    RecordEncoder,
    as_sample_error,
    check_characters,
    check_length,
    encode_checked,
)
from mono_internvl.data.order import Mixture
from mono_internvl.data.packing import pack
from mono_internvl.data.sources import MeasuredSource, Source
from mono_internvl.errors import ImageError, PromptError, SampleError
from mono_internvl.processing.encoding import Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Placed:
    """A sample of a step: where it is in the stream, and how long it will be."""

    position: int
    length: int


class PackedStream(Dataset[tuple[Batch, ...]]):
    """`stream[n]` holds the micro-batches of this process for step n, each one packed row.

    All processes get the same number of them; one for which no row is left gets a row without
    labels.

    Args:
        sources: Where records come from.
        encode: A record to its length, and to ids, labels and pixels.
        plan: How to cut; its accumulation, window and number of steps have no part in it.
        packed_tokens: Most tokens of a row.
        seed: Of the order.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encode: RecordEncoder,
        plan: BatchPlan,
        packed_tokens: int,
        seed: int,
    ):
        self.sources, self.encode, self.plan, self.seed = sources, encode, plan, seed
        self.packed_tokens = packed_tokens
        self.mixture = Mixture(
            tuple(len(source) for source in sources), tuple(s.repeat for s in sources), seed
        )
        if not len(self.mixture):
            raise SampleError("an epoch has no record: raise repeat_time of the sources")
        self._measured = [s if isinstance(s, MeasuredSource) else None for s in sources]
        counted = [s.name for i, s in enumerate(sources) if self._stored_length(i, 0) is None]
        if counted and plan.rank == 0:
            logger.warning(
                "lengths of %s are not stored, or were counted with another tokenizer: every "
                "process counts those of all processes; `mono-internvl data prepare` stores them",
                ", ".join(counted),
            )

    def __getitem__(self, step: int) -> tuple[Batch, ...]:
        plan = self.plan
        first = step * plan.batch_size
        placed: list[_Placed] = []
        skipped: list[Skipped] = []
        for position in range(first, first + plan.batch_size):
            try:
                placed.append(_Placed(position, self._length(position)))
            except SampleError as error:
                if plan.on_bad_sample == "raise":
                    raise
                # Every process meets it; one of them says so.
                if position % plan.world_size == plan.rank:
                    skipped.append(self._skipped(position, error))
        rows = pack([sample.length for sample in placed], self.packed_tokens)
        count = max(1, -(-len(rows) // plan.world_size))
        own = rows[plan.rank :: plan.world_size]
        batches = []
        for number in range(count):
            row = [placed[i] for i in own[number]] if number < len(own) else []
            batches.append(self._row(row, () if number else tuple(skipped)))
        return tuple(batches)

    def _row(self, placed: Sequence[_Placed], skipped: tuple[Skipped, ...]) -> Batch:
        samples: list[Sample] = []
        ids: list[str] = []
        sources: list[int] = []
        bad = list(skipped)
        for sample in placed:
            try:
                encoded, record_id = self._sample(sample)
                samples.append(encoded)
                ids.append(record_id)
                sources += [self.mixture.locate(sample.position)[0]] * sample.length
            except SampleError as error:
                if self.plan.on_bad_sample == "raise":
                    raise
                bad.append(self._skipped(sample.position, error))
        batch = collate_packed(samples, self.plan, tuple(ids), tuple(bad))
        return replace(batch, source_ids=torch.tensor(sources or [0])[None])

    def _sample(self, placed: _Placed) -> tuple[Sample, str]:
        source, index = self.mixture.locate(placed.position)
        record = drawn(self.sources[source].record(index), self.seed, placed.position)
        sample = encode_checked(self.encode, record, self.plan.max_tokens)
        if len(sample.input_ids) != placed.length:
            raise SampleError(
                f"{record.where}: {len(sample.input_ids)} tokens, its shard's index says "
                f"{placed.length}; run `mono-internvl data prepare` again",
                reason="length differs",
            )
        return sample, record.record_id

    def _length(self, position: int) -> int:
        """Tokens of a sample of the stream.

        Raises:
            SampleError: It is bad, as far as its length tells.
        """
        source, index = self.mixture.locate(position)
        found = self._stored_length(source, index)
        if found is not None and found <= self.plan.max_tokens:
            return found
        record = self.sources[source].record(index)
        check_characters(record, self.plan.max_tokens)
        try:
            length = self.encode.length(self.encode.measure(record))
        except (ImageError, PromptError) as error:
            raise as_sample_error(error, record.where) from error
        check_length(length, record.where, self.plan.max_tokens)
        return length

    def _stored_length(self, source: int, index: int) -> int | None:
        stored = self._measured[source]
        measure = None if stored is None else stored.measure(index, self.encode.tokenized_by)
        return None if measure is None else self.encode.length(measure)

    def _skipped(self, position: int, error: SampleError) -> Skipped:
        return Skipped.of(self.sources[self.mixture.locate(position)[0]].name, error)
