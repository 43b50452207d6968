"""A measurement as a row: what ran, on what, how long, and everything needed to run it again."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mono_internvl.errors import ConfigError

BENCH_ROWS, TARGETS = "bench.jsonl", "targets.jsonl"


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One subject of one comparison.

    Attributes:
        what: The comparison: "prefill", "decode", ...
        subject: What was measured.
        shapes: Its sizes by name: batch, tokens, visual_tokens, width, ...
        layers: Decoder layers; a saving in the last of them is worth about 1 / layers.
        dtype: Of weights and activations.
        device: Name of the processor or accelerator.
        unit: Of the three percentiles.
        p20: 20 % of the runs were at or below.
        p50: Median.
        p80: 80 % of the runs were at or below.
        n: Runs counted, each interleaved with one of every other subject.
        clock: "cpu": seconds of the process on all its threads; "wall" on accelerators.
        wall_p50: Median of wall seconds; on a shared machine, for information only.
        cpu_p50: Median of CPU seconds; on an accelerator, of the host that launches.
        baseline: Subject that `ratio` compares with.
        ratio: Median over the interleaved rounds of this subject / baseline.
        gflop: Multiplications and additions of all weight matrices in one run, 1e9.
        notes: Further settings by name: attention, last_layer_skip, threads, ...
        command: What gives the row again.
        commit: Of the source; "+" follows where the tree was changed.
        versions: Version by package.
        date: Day, as 2026-01-31.
    """

    what: str
    subject: str
    shapes: Mapping[str, int]
    layers: int
    dtype: str
    device: str
    unit: str = "s"
    p20: float
    p50: float
    p80: float
    n: int
    clock: str = "cpu"
    wall_p50: float | None = None
    cpu_p50: float | None = None
    baseline: str | None = None
    ratio: float | None = None
    gflop: float | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    command: str
    commit: str
    versions: Mapping[str, str]
    date: str

    def to_json(self) -> str:
        """The row as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    def to_line(self) -> str:
        """The row for a terminal."""
        of = self.what.partition(": ")[2]
        name = f"{of}: {self.subject}" if of else self.subject
        ratio = "" if self.ratio is None else f"{self.ratio:.3f} x {self.baseline}"
        return f"{name:<72} {self.p50:10.4f} {self.unit:<10} {ratio}"


@dataclass(frozen=True)
class Target:
    """A claim with its bound.

    Attributes:
        name: What is claimed.
        target: The bound as text: "<= 0.96".
        value: What was measured; None where it was not.
        met: Whether the value keeps the bound; None where there is no value.
        note: Conditions, or why there is no value.
    """

    name: str
    target: str
    value: float | None
    met: bool | None
    note: str = ""

    @classmethod
    def judge(
        cls, name: str, sign: str, bound: float, value: float | None, note: str = ""
    ) -> Target:
        """The target `value` `sign` `bound`, with `sign` one of "<=" and ">="."""
        met = None if value is None else (value <= bound if sign == "<=" else value >= bound)
        return cls(name, f"{sign} {bound:g}", None if value is None else round(value, 4), met, note)

    def to_json(self) -> str:
        """The target as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    def to_line(self) -> str:
        """The target for a terminal."""
        met = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        return f"{self.name:<72} {self.target:<8} {self.value} {met}"


def device_name(device: torch.device) -> str:
    """The accelerator's own name, or the processor's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} thread(s)"


def read_rows(file: Path) -> list[BenchRow]:
    """The rows of a JSON lines file; none if there is no such file.

    Raises:
        ConfigError: A line that is not a row with its fields.
    """
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
        try:
            rows.append(BenchRow(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{file}:{number}: {error}; expected a row of `mono-internvl bench --json`"
            ) from error
    return rows


def keep(folder: Path, rows: Iterable[BenchRow | Target]) -> Iterator[BenchRow | Target]:
    """Pass rows on, writing each down as soon as it is measured: an end by force loses no row.

    Args:
        folder: Measured rows are added to its `bench.jsonl`. Targets replace those of the same
            name in its `targets.jsonl`, others of which stay, when the last row was passed on.
        rows: May be measured while they are asked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    targets: dict[str, str] = {}
    with (folder / BENCH_ROWS).open("a", encoding="utf-8") as out:
        for row in rows:
            if isinstance(row, BenchRow):
                out.write(row.to_json() + "\n")
                out.flush()
            else:
                targets[row.name] = row.to_json()
            yield row
    if targets:
        file = folder / TARGETS
        lines = file.read_text("utf-8").splitlines() if file.is_file() else []
        found = {json.loads(line)["name"]: line for line in lines} | targets
        file.write_text("".join(f"{line}\n" for line in found.values()), encoding="utf-8")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
