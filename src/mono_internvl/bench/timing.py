"""Time subjects against each other: round after round, each subject once, in turning order.

On a shared machine nothing but a comparison within one run means anything: a neighbour slows all
subjects of a round alike, so ratios are taken round by round and their median is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mono_internvl.bench.rows import BenchRow, device_name, provenance

_WEIGHT_PRODUCTS = ("aten.mm", "aten.addmm", "aten._grouped_mm")


@dataclass(frozen=True)
class Subject:
    """Something that is measured.

    Attributes:
        name: Of the row.
        run: Runs it once.
        notes: Settings worth a place in the row.
        before: Called before every run, outside the time.
        units: What one run yields (tokens, images); times are divided by it.
    """

    name: str
    run: Callable[[], object]
    notes: Mapping[str, Any] = field(default_factory=dict)
    before: Callable[[], object] | None = None
    units: float = 1.0


@dataclass(frozen=True)
class Timing:
    """Seconds of the runs of one subject.

    Attributes:
        cpu: Of the process, on all its threads.
        wall: By the clock on the wall, the device waited for.
        gflop: Of all weight matrices in one run.
    """

    cpu: tuple[float, ...]
    wall: tuple[float, ...]
    gflop: float


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values do not exceed, interpolated."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def interleaved(
    subjects: Sequence[Subject], rounds: int, device: torch.device, warmup: int = 1
) -> dict[str, Timing]:
    """Time every subject once per round; the one that begins a round turns.

    Args:
        subjects: With different names.
        rounds: Runs of each that count.
        device: Where they run; an accelerator is waited for before and after each run.
        warmup: Uncounted runs of each, the first of which counts the multiplications.
    """
    gflop = {}
    for subject in subjects:
        with FlopCounterMode(display=False) as counter:
            _once(subject, device)
        counts = counter.get_flop_counts().get("Global", {})
        gflop[subject.name] = (
            sum(n for op, n in counts.items() if str(op) in _WEIGHT_PRODUCTS) / 1e9
        )
        for _ in range(warmup - 1):
            _once(subject, device)
    seconds: dict[str, list[tuple[float, float]]] = {subject.name: [] for subject in subjects}
    for number in range(rounds):
        first = number % len(subjects)
        for subject in (*subjects[first:], *subjects[:first]):
            seconds[subject.name].append(_once(subject, device))
    return {
        name: Timing(tuple(c for c, _ in runs), tuple(w for _, w in runs), gflop[name])
        for name, runs in seconds.items()
    }


def measure(
    what: str,
    subjects: Sequence[Subject],
    *,
    baseline: str,
    rounds: int,
    device: torch.device,
    command: str,
    shapes: Mapping[str, int],
    layers: int,
    dtype: torch.dtype,
    unit: str = "s",
) -> list[BenchRow]:
    """Time subjects against each other and make their rows.

    Args:
        what: Name of the comparison.
        subjects: What to time; their times are divided by their `units`.
        baseline: Name of the subject that the others are compared with.
        rounds: Runs of each.
        device: Where they run.
        command: For the rows.
        shapes: For the rows.
        layers: For the rows.
        dtype: For the rows.
        unit: Of the percentiles; "s" or what a subject's `units` make of it.
    """
    timings = interleaved(subjects, rounds, device)
    clock = "cpu" if device.type == "cpu" else "wall"
    origin, name = provenance(command), device_name(device)
    per_unit = {
        subject.name: [t / subject.units for t in getattr(timings[subject.name], clock)]
        for subject in subjects
    }
    rows = []
    for subject in subjects:
        values, timing = per_unit[subject.name], timings[subject.name]
        pairs = zip(values, per_unit[baseline], strict=True)
        rows.append(
            BenchRow(
                what=what,
                subject=subject.name,
                shapes=dict(shapes),
                layers=layers,
                dtype=str(dtype).removeprefix("torch."),
                device=name,
                unit=unit,
                p20=percentile(values, 0.2),
                p50=percentile(values, 0.5),
                p80=percentile(values, 0.8),
                n=len(values),
                clock=clock,
                wall_p50=percentile(timing.wall, 0.5) / subject.units,
                baseline=baseline,
                ratio=percentile([mine / base for mine, base in pairs], 0.5),
                gflop=timing.gflop / subject.units,
                notes=dict(subject.notes),
                **origin,
            )
        )
    return rows


def _once(subject: Subject, device: torch.device) -> tuple[float, float]:
    """One run: CPU seconds and wall seconds."""
    if subject.before is not None:
        subject.before()
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    subject.run()
    _wait(device)
    return time.process_time() - cpu, time.perf_counter() - wall


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
