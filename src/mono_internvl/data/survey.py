"""Every record looked at once, or some of them: `mono-internvl data verify` and `data inspect`."""

from __future__ import annotations

import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch.utils.data import Dataset

from mono_internvl.data.batches import Skipped, read_ahead
from mono_internvl.data.encoder import RecordEncoder, encode_checked
from mono_internvl.data.order import permuted
from mono_internvl.data.records import Record
from mono_internvl.data.sources import Source
from mono_internvl.errors import SampleError
from mono_internvl.processing.encoding import Sample


@dataclass(frozen=True)
class Finding:
    """What was found of a record.

    Attributes:
        source: Name of its source.
        tokens: Of its sample; 0 if it is bad.
        learnt_tokens: Those of them with a label.
        tiles: Of each of its images.
        bad: Why it is bad; None if it is not.
    """

    source: str
    tokens: int = 0
    learnt_tokens: int = 0
    tiles: tuple[int, ...] = ()
    bad: Skipped | None = None


@dataclass
class SourceCount:
    """What was found of the records of a source.

    Attributes:
        records: Looked at.
        bad: Of these, by reason.
        tokens: Of each good one.
        learnt_tokens: Of all good ones.
        tiles: Images by their number of tiles.
    """

    records: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    tokens: array[int] = field(default_factory=lambda: array("L"))
    learnt_tokens: int = 0
    tiles: Counter[int] = field(default_factory=Counter)

    def add(self, finding: Finding) -> None:
        """Count a record in."""
        self.records += 1
        if finding.bad is not None:
            self.bad[finding.bad.reason] += 1
            return
        self.tokens.append(finding.tokens)
        self.learnt_tokens += finding.learnt_tokens
        self.tiles.update(finding.tiles)

    def summary(self) -> dict[str, object]:
        """The counts as plain values."""
        quantiles = (
            statistics.quantiles(self.tokens, n=20) if len(self.tokens) > 1 else [*self.tokens] * 19
        )
        known = {"median": round(quantiles[9]), "p95": round(quantiles[18])} if quantiles else {}
        return {
            "records": self.records,
            "bad": dict(self.bad.most_common()),
            "tokens": sum(self.tokens),
            "learnt_tokens": self.learnt_tokens,
            "tokens_of_a_record": {**known, "longest": max(self.tokens, default=0)},
            "images_by_tiles": {str(n): self.tiles[n] for n in sorted(self.tiles)},
        }


class Survey(Dataset[Finding]):
    """Findings by the place of a record, sources one behind the other.

    Args:
        sources: Where records come from.
        encode: A record to ids, labels and pixels: images are decoded whole.
        max_tokens: Longest sample.
    """

    def __init__(self, sources: Sequence[Source], encode: RecordEncoder, max_tokens: int):
        self.sources, self.encode, self.max_tokens = sources, encode, max_tokens

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def __getitem__(self, number: int) -> Finding:
        source, index = self._locate(number)
        try:
            _, sample = self._read(source, index)
        except SampleError as error:
            return Finding(source.name, bad=Skipped.of(source.name, error))
        learnt = int((sample.labels >= 0).sum())
        return Finding(source.name, len(sample.input_ids), learnt, sample.num_tiles)

    def sample(self, number: int) -> tuple[Record, Sample]:
        """A record and what is made of it.

        Raises:
            SampleError: It is bad.
        """
        return self._read(*self._locate(number))

    def spread(self, count: int) -> list[int]:
        """Places of so many records, in an order that mixes all of them."""
        return [permuted(i, len(self), key=0) for i in range(min(count, len(self)))]

    def findings(self, places: Sequence[int], workers: int = 0) -> Iterator[Finding]:
        """The findings at some places, in order."""
        return read_ahead(self, places, workers)

    def _locate(self, number: int) -> tuple[Source, int]:
        for source in self.sources:
            if number < len(source):
                return source, number
            number -= len(source)
        raise IndexError(number)

    def _read(self, source: Source, index: int) -> tuple[Record, Sample]:
        record = source.record(index)
        return record, encode_checked(self.encode, record, self.max_tokens)


def count(findings: Iterable[Finding]) -> dict[str, SourceCount]:
    """Findings by source."""
    counts: dict[str, SourceCount] = {}
    for finding in findings:
        counts.setdefault(finding.source, SourceCount()).add(finding)
    return counts
