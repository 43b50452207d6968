"""Records that a run leaves out: counted, said, and not too many of them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mono_internvl.data.batches import Skipped
from mono_internvl.errors import SampleError
from mono_internvl.runs.json_lines import to_line

logger = logging.getLogger(__name__)

QUARANTINE_FILE = "quarantine.jsonl"
"""In a run's folder: every record that it left out."""
_LEAST_RECORDS = 100
"""The ratio is that of at least so many records: two bad ones among the first ten say little."""
_LOGGED_ONE_BY_ONE = 10
"""Of each source and reason; after them, every tenfold count is said."""


def quarantine(file: Path, step: int, skipped: Iterable[Skipped]) -> None:
    """Add records to the list of those that a run left out.

    Args:
        file: JSON lines, one per record: its step, source and reason, and what is wrong, beginning
            with its place.
        step: Of the run, from 1.
        skipped: The records.
    """
    with file.open("a", encoding="utf-8") as out:
        for record in skipped:
            out.write(to_line({"step": step, **dataclasses.asdict(record)}))


@dataclass
class _Kind:
    """Skipped records of one source with one reason: how many, and the first of them."""

    count: int
    first: str


@dataclass
class SkipCounts:
    """What was skipped since a stage began, a resumed one included.

    Attributes:
        max_ratio: Of `num_skipped` to `num_records`, beyond which `check` raises.
        num_records: Records that all processes read, good and bad.
        num_skipped: The bad ones among them.
        kinds: By source and reason, of all processes.
    """

    max_ratio: float
    num_records: int = 0
    num_skipped: int = 0
    kinds: dict[tuple[str, str], _Kind] = field(default_factory=dict)

    def note(self, skipped: Iterable[Skipped], *, quiet: bool = False) -> None:
        """Count what was left out, and log it unless another process does."""
        for record in skipped:
            key = (record.source, record.reason)
            kind = self.kinds.setdefault(key, _Kind(0, record.message))
            kind.count += 1
            if quiet:
                continue
            if kind.count <= _LOGGED_ONE_BY_ONE:
                logger.warning("skipped %s", record.message)
            elif str(kind.count).rstrip("0") == "1":
                count = f"{kind.count:,}"
                logger.warning("skipped %s of %s (%s), last %s", count, *key, record.message)

    def add(self, num_records: int, num_skipped: int) -> None:
        """Count what all processes read and left out in a step."""
        self.num_records += num_records
        self.num_skipped += num_skipped

    def check(self, quarantined: Path | None = None) -> None:
        """Stop where too much is left out; the counts by source and reason are logged before.

        Args:
            quarantined: Where all of them are listed; only the process that is given it logs.

        Raises:
            SampleError: More than `max_ratio` of the records were skipped.
        """
        allowed = self.max_ratio * max(self.num_records, _LEAST_RECORDS)
        if self.num_skipped <= allowed:
            return
        if quarantined is not None:
            logger.error("skipped records, all listed in %s:\n%s", quarantined, self.table())
        worst = max(self.kinds.values(), key=lambda kind: kind.count, default=None)
        example = f", for example {worst.first}" if worst else ""
        raise SampleError(
            f"{self.num_skipped:,} of {self.num_records:,} records were skipped, more than "
            f"max_skipped_ratio={self.max_ratio:g}{example}; mend the data, or raise "
            "max_skipped_ratio and start again to go on"
        )

    def table(self) -> str:
        """A line per source and reason: how many, and the first of them."""
        rows = sorted(self.kinds.items(), key=lambda item: -item[1].count)
        return "\n".join(
            f"{kind.count:>12,}  {source:<20}  {reason:<16}  {kind.first}"
            for (source, reason), kind in rows
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a saved state."""
        return {
            "records": self.num_records,
            "skipped": self.num_skipped,
            "kinds": [
                {"source": source, "reason": reason, "number": kind.count, "first": kind.first}
                for (source, reason), kind in self.kinds.items()
            ],
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], max_ratio: float) -> SkipCounts:
        """The counts of a saved state; an older one without counts begins at none."""
        counts = cls(max_ratio, saved.get("records", 0), saved.get("skipped", 0))
        for row in saved.get("kinds", ()):
            counts.kinds[row["source"], row["reason"]] = _Kind(row["number"], row["first"])
        return counts
