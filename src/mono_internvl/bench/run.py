"""`mono-internvl bench WHAT`: name a comparison, get its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from mono_internvl.bench.data import bench_data
from mono_internvl.bench.decode import bench_decode, bench_prefix
from mono_internvl.bench.engine import bench_engine
from mono_internvl.bench.experts import bench_experts
from mono_internvl.bench.gpu import bench_gpu
from mono_internvl.bench.images import bench_images
from mono_internvl.bench.models import Setting, size_of
from mono_internvl.bench.prefill import bench_modular, bench_prefill
from mono_internvl.bench.profile import bench_profile
from mono_internvl.bench.rows import BenchRow, Claim
from mono_internvl.bench.samples import bench_samples
from mono_internvl.bench.serve import bench_serve
from mono_internvl.bench.targets import bench_targets, targets_of_2b
from mono_internvl.bench.train import bench_train
from mono_internvl.compute import make_plan
from mono_internvl.errors import ConfigError
from mono_internvl.recipes.evip import EVIP

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Precision -> dtype of weights and activations."""


Rows = Iterable[BenchRow | Claim]


def _prefill(setting: Setting) -> Rows:
    rows = bench_prefill(setting)
    yield from rows
    yield from targets_of_2b(rows)


COMPARISONS: dict[str, Callable[[Setting], Rows]] = {
    "prefill": _prefill,
    "modular": bench_modular,
    "decode": bench_decode,
    "prefix": bench_prefix,
    "profile": bench_profile,
    "train": partial(bench_train, stages=EVIP.stages),
    "serve": bench_serve,
    "engine": bench_engine,
    "samples": bench_samples,
    "images": bench_images,
    "data": partial(bench_data, stages=EVIP.stages),
    "targets": bench_targets,
    "experts": bench_experts,
    "gpu": partial(bench_gpu, stage=EVIP.stages[0]),
}
"""Name -> what runs it."""


def bench(
    what: str,
    *,
    size: str | None = None,
    precision: str = "auto",
    device: str | None = None,
    rounds: int = 5,
) -> Rows:
    """Run one comparison.

    Returns:
        Its rows; nothing is measured before the first is asked for.

    Args:
        what: One of `COMPARISONS`.
        size: "tiny", "middle" or "2b"; unless given, "2b" for "gpu" and "middle" for others.
        precision: Of weights and activations: "bf16", "fp32", or "auto" for what the device
            multiplies faster.
        device: "auto", "cpu", "cuda" or "cuda:1"; unless given, "auto" for "gpu" and "cpu" for
            others.
        rounds: Interleaved runs of every subject.

    Raises:
        ConfigError: A name or number out of range.
    """
    if what not in COMPARISONS:
        raise ConfigError(f"bench {what!r} is not known; choose from {', '.join(COMPARISONS)}")
    if rounds < 1:
        raise ConfigError(f"rounds={rounds}; expected a number >= 1")
    size = size or ("2b" if what == "gpu" else "middle")
    device = device or ("auto" if what == "gpu" else "cpu")
    chosen = size_of(size)
    plan = make_plan(device, precision, processes=1)
    precision = plan.precision
    command = f"mono-internvl bench {what} --size {size} --precision {precision} --rounds {rounds}"
    place = torch.device(plan.device)
    if place.type != "cpu":
        command += f" --device {device}"
        place = torch.device(place.type, place.index or 0)
        torch.cuda.set_device(place)  # events, graphs and kernels go to the current one
    return _measured(what, Setting(chosen, DTYPES[precision], place, rounds, command))


def _measured(what: str, setting: Setting) -> Rows:
    yield from COMPARISONS[what](setting)
