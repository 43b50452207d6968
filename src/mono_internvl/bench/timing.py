"""Time subjects against each other: round after round, each subject once, in turning order.

On a shared machine nothing but a comparison within one run means anything: a neighbour slows all
subjects of a round alike, so ratios are taken round by round and their median is reported.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mono_internvl.bench.models import Setting
from mono_internvl.bench.rows import BenchRow, device_name
from mono_internvl.runs.provenance import commit, today, versions

LEAST_SECONDS = 5e-3
"""Shorter runs on an accelerator are repeated until they last as long."""
_WEIGHT_PRODUCTS = (
    "aten.mm",
    "aten.addmm",
    "aten._grouped_mm",
    "mono_internvl.routed_linear",
    "mono_internvl.routed_hidden",
    "mono_internvl.routed_hidden_backward",
    "mono_internvl.routed_weight_gradient",
)


@dataclass(frozen=True)
class Subject:
    """Something that is measured.

    Attributes:
        name: Of the row.
        run: Runs it once.
        notes: Settings worth a place in the row.
        before: Called before every run, outside the time.
        units: What one run yields (tokens, images); times are divided by it.
        is_captured: Whether an accelerator replays it as a graph; it must not wait for the device
            nor make tensors whose contents matter later.
        peer: Name of the subject that runs the same kernels: what it is like for like with.
    """

    name: str
    run: Callable[[], object]
    notes: Mapping[str, Any] = field(default_factory=dict)
    before: Callable[[], object] | None = None
    units: float = 1.0
    is_captured: bool = False
    peer: str | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds of the runs of one subject.

    Attributes:
        cpu: Of the process, on all its threads.
        wall: By the clock on the wall; on an accelerator, between two events in its stream.
        gflop: Of all weight matrices in one run; what a fused kernel makes again is not counted.
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
    gflop, runs = {}, {}
    for subject in subjects:
        if subject.before is not None:
            subject.before()
        with FlopCounterMode(display=False) as counter:
            subject.run()
        counts = counter.get_flop_counts().get("Global", {})
        gflop[subject.name] = (
            sum(n for op, n in counts.items() if str(op) in _WEIGHT_PRODUCTS) / 1e9
        )
        runs[subject.name] = (subject.run, 1)
        if device.type == "cuda":
            runs[subject.name] = _prepared(subject, device)
        for _ in range(warmup - 1):
            _once(subject, *runs[subject.name], device)
    seconds: dict[str, list[tuple[float, float]]] = {subject.name: [] for subject in subjects}
    for number in range(rounds):
        first = number % len(subjects)
        for subject in (*subjects[first:], *subjects[:first]):
            seconds[subject.name].append(_once(subject, *runs[subject.name], device))
    return {
        name: Timing(tuple(c for c, _ in runs), tuple(w for _, w in runs), gflop[name])
        for name, runs in seconds.items()
    }


def measure(
    what: str,
    subjects: Sequence[Subject],
    setting: Setting,
    *,
    baseline: str,
    shapes: Mapping[str, int] | None = None,
    layers: int | None = None,
    unit: str = "s",
) -> list[BenchRow]:
    """Time subjects against each other and make their rows.

    Args:
        what: Name of the comparison.
        subjects: What to time; their times are divided by their `units`.
        setting: Device and rounds; size, dtype and command for the rows.
        baseline: Name of the subject that the others are compared with.
        shapes: For the rows, where they are not the size's.
        layers: For the rows, where they are not the size's.
        unit: Of the percentiles; "s" or what a subject's `units` make of it.
    """
    timings = interleaved(subjects, setting.rounds, setting.device)
    made_with = fields_of(setting)
    clock = made_with["clock"]
    per_unit = {
        subject.name: [t / subject.units for t in getattr(timings[subject.name], clock)]
        for subject in subjects
    }
    rows = []
    for subject in subjects:
        values, timing = per_unit[subject.name], timings[subject.name]
        rows.append(
            BenchRow(
                what=what,
                subject=subject.name,
                shapes=dict(setting.size.shapes if shapes is None else shapes),
                layers=setting.size.layers if layers is None else layers,
                unit=unit,
                p20=percentile(values, 0.2),
                p50=percentile(values, 0.5),
                p80=percentile(values, 0.8),
                n=len(values),
                wall_p50=percentile(timing.wall, 0.5) / subject.units,
                cpu_p50=percentile(timing.cpu, 0.5) / subject.units,
                baseline=baseline,
                ratio=_ratio(values, per_unit[baseline]),
                peer=subject.peer if subject.peer in per_unit else None,
                peer_ratio=_ratio(values, per_unit[subject.peer])
                if subject.peer in per_unit
                else None,
                gflop=timing.gflop / subject.units,
                notes=dict(subject.notes),
                **made_with,
            )
        )
    return rows


def _ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios of the rounds."""
    return percentile([mine / other for mine, other in zip(values, others, strict=True)], 0.5)


def fields_of(setting: Setting) -> dict[str, Any]:
    """The fields of a row that say with what and by what it was made."""
    return {
        "dtype": str(setting.dtype).removeprefix("torch."),
        "device": device_name(setting.device),
        "clock": "cpu" if setting.device.type == "cpu" else "wall",
        "command": setting.command,
        "commit": commit(),
        "versions": versions(),
        "date": today(),
    }


def repeats_for(seconds: float) -> int:
    """Runs in a row that last long enough for the clock of a device, at most 200."""
    return max(1, min(200, math.ceil(LEAST_SECONDS / max(seconds, 1e-9))))


def captured(subject: Subject) -> Callable[[], None]:
    """A subject's run as a CUDA graph: replaying it costs the host one launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch asks for before a capture
        for _ in range(2):
            if subject.before is not None:
                subject.before()
            subject.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        subject.run()
    return graph.replay


def _prepared(subject: Subject, device: torch.device) -> tuple[Callable[[], object], int]:
    """What to time on an accelerator, and how often in a row."""
    run = captured(subject) if subject.is_captured else subject.run
    if subject.before is not None:
        return run, 1
    _, seconds = _once(subject, run, 1, device)
    return run, repeats_for(seconds)


def _once(
    subject: Subject, run: Callable[[], object], repeats: int, device: torch.device
) -> tuple[float, float]:
    """CPU seconds and wall seconds of one run, the mean of `repeats` in a row."""
    if subject.before is not None:
        subject.before()
    if device.type == "cuda":
        return _on_device(run, repeats, device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return cpu / repeats, wall / repeats


def _on_device(
    run: Callable[[], object], repeats: int, device: torch.device
) -> tuple[float, float]:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    cpu = time.process_time()
    first.record()
    for _ in range(repeats):
        run()
    last.record()
    torch.cuda.synchronize(device)
    cpu = time.process_time() - cpu
    return cpu / repeats, first.elapsed_time(last) / 1e3 / repeats
