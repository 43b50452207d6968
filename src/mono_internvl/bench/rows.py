"""A measurement as a row: what ran, on what, how long, and everything needed to run it again."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from filelock import FileLock

from mono_internvl.errors import ConfigError
from mono_internvl.runs.folder import write_whole

BENCH_ROWS, TARGETS, LOCK = "bench.jsonl", "targets.jsonl", ".bench.lock"
_ROW_BEGINS = b'{"what": '
_Line = TypeVar("_Line")
logger = logging.getLogger(__name__)


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
        peer: Subject that runs the same kernels, where there is one: the like-for-like comparison.
        peer_ratio: Median over the interleaved rounds of this subject / peer.
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
    peer: str | None = None
    peer_ratio: float | None = None
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
class Claim:
    """A claim with its bound.

    Attributes:
        name: What is claimed.
        target: The bound as text: "<= 0.96".
        value: What was measured; None where it was not.
        met: Whether the value keeps the bound; None where there is no value.
        note: Conditions, or why there is no value.
        device: What it was measured on.
    """

    name: str
    target: str
    value: float | None
    met: bool | None
    note: str = ""
    device: str = ""

    @classmethod
    def judge(
        cls,
        name: str,
        sign: str,
        bound: float,
        value: float | None,
        note: str = "",
        device: str = "",
    ) -> Claim:
        """The target `value` `sign` `bound`, with `sign` one of "<=" and ">="."""
        met = None if value is None else (value <= bound if sign == "<=" else value >= bound)
        rounded = None if value is None else round(value, 4)
        return cls(name, f"{sign} {bound:g}", rounded, met, note, device)

    def to_json(self) -> str:
        """The target as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    def to_line(self) -> str:
        """The target for a terminal."""
        met = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        return f"{self.name:<72} {self.target:<8} {self.value} {met}"


def device_name(device: torch.device) -> str:
    """The accelerator's own name, or the processor's with instructions and threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, flags = _processor()
    return f"{name} ({instructions(flags)}), {torch.get_num_threads()} thread(s)"


def instructions(flags: Collection[str]) -> str:
    """The instructions that decide how fast products are, as a row names them.

    Args:
        flags: Of the processor, as /proc/cpuinfo has them.

    Returns:
        Those for bf16 products where there are any, else the widest vectors that PyTorch uses;
        where the environment keeps PyTorch from using all of them, what it is limited to: such a
        row imitates another processor.
    """
    if limit := os.environ.get("ATEN_CPU_CAPABILITY"):
        return f"limited to {limit.upper()}"
    products = [name for name in ("avx512_bf16", "amx_bf16") if name in flags]
    return ", ".join(products).upper() or str(torch.backends.cpu.get_cpu_capability())


def read_rows(file: Path) -> list[BenchRow]:
    """The rows of a JSON lines file; none if there is no such file.

    Raises:
        ConfigError: A line that is not a row with its fields.
    """
    return _read_lines(file, BenchRow, "a row")


def check_folder(folder: Path) -> None:
    """Make a folder ready to `keep` rows in, before any is measured.

    A last row that an end by force cut in two is no row and goes, so that the next one does not
    continue its line.

    Raises:
        ConfigError: It cannot be written to, or holds a line that is no row or no target.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder), _locked(folder) as file:
            _end_last_line(file)
            read_rows(folder / BENCH_ROWS)
            _read_targets(folder)
    except OSError as error:
        raise ConfigError(
            f"out={str(folder)!r}: not a folder to write to ({error}); choose another folder"
        ) from error


def keep(folder: Path, rows: Iterable[BenchRow | Claim]) -> Iterator[BenchRow | Claim]:
    """Pass rows on, writing each down as soon as it is measured: an end by force loses no row.

    Several may write to one folder at once.

    Args:
        folder: Measured rows are added to its `bench.jsonl`. Targets replace those of the same
            name and device in its `targets.jsonl`, others of which stay, when the last row was
            passed on; one that was not measured does not replace one that was.
        rows: May be measured while they are asked for.

    Raises:
        ConfigError: As by `check_folder`, before the first row is asked for.
    """
    check_folder(folder)
    targets: list[Claim] = []
    for row in rows:
        if isinstance(row, BenchRow):
            with _locked(folder) as file:
                _end_last_line(file)
                file.write(f"{row.to_json()}\n".encode())
        else:
            targets.append(row)
        yield row
    if targets:
        with _locked(folder):
            found = {(t.name, t.device): t for t in _read_targets(folder)}
            for target in targets:
                key = (target.name, target.device)
                known = found.get(key)
                if known is None or known.value is None or target.value is not None:
                    found[key] = target
            lines = "\n".join(target.to_json() for target in found.values())
            write_whole(folder / TARGETS, lines)


def _read_targets(folder: Path) -> list[Claim]:
    return _read_lines(folder / TARGETS, Claim, "a target")


def _read_lines(file: Path, kind: Callable[..., _Line], what: str) -> list[_Line]:
    if not file.exists():
        return []
    found = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            found.append(kind(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{file}:{number}: {error}; expected {what} of `mono-internvl bench --json`; "
                "mend or delete the line"
            ) from error
    return found


@contextmanager
def _locked(folder: Path) -> Iterator[IO[bytes]]:
    """The folder's `bench.jsonl`, held against other processes with all that is in the folder."""
    with FileLock(folder / LOCK), (folder / BENCH_ROWS).open("a+b") as file:
        yield file


def _end_last_line(file: IO[bytes]) -> None:
    """End the last line of a held file with a line break, or drop it if it is a part of a row."""
    file.seek(0)
    content = file.read()
    last = content.rpartition(b"\n")[2]
    if not last:
        return
    try:
        json.loads(last)
        is_part = False
    except ValueError:
        is_part = last.startswith(_ROW_BEGINS[: len(last)])
    if is_part:
        logger.warning("%s: dropped a last row that was cut in two: %r", file.name, last)
        file.truncate(len(content) - len(last))
    else:
        file.write(b"\n")
        file.flush()


def _processor() -> tuple[str, list[str]]:
    """Name and flags."""
    info, found = Path("/proc/cpuinfo"), dict[str, str]()
    if info.is_file():
        for line in info.read_text("utf-8").splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    return name, found.get("flags", "").split()
