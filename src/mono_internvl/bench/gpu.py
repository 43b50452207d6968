"""`bench gpu`: build, check and time on a GPU, and judge what is claimed of one.

Without a GPU every claim is left without a value; the tiny size runs all of it on a CPU, as a
rehearsal whose rows no claim is judged by.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from mono_internvl.bench.decode import bench_graph
from mono_internvl.bench.dense import DENSE
from mono_internvl.bench.experts import (
    FFN,
    FORWARD,
    IMPLEMENTATIONS,
    LIMIT,
    TWO,
    Cell,
    bench_experts,
    check_implementations,
    largest_gap,
    runnable,
)
from mono_internvl.bench.models import SIZES, Setting
from mono_internvl.bench.rows import BenchRow, Claim
from mono_internvl.bench.serve import FIRST, IMAGE_TILES, MODULAR, OURS, bench_serve
from mono_internvl.bench.train import bench_stages
from mono_internvl.training.recipe import Stage

SANITIZER, SANITIZER_TIMEOUT_S = "compute-sanitizer", 180
NO_GPU = "not measured: needs a CUDA device"
_TILE_TOKENS = 256
_2B = SIZES["2b"]
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")


def bench_gpu(setting: Setting, stage: Stage) -> Iterator[BenchRow | Claim]:
    """Check the kernels, time experts, decoding, first tokens and a training step, judge.

    Args:
        setting: fp32 is checked, too, whatever the dtype.
        stage: S1.1; a step of it is timed.
    """
    if setting.device.type != "cuda" and setting.size.name != "tiny":
        yield from gpu_targets(())
        return
    yield memory_check(setting.device)
    for dtype in (torch.float32, setting.dtype):
        yield from check_implementations(dtype, setting.device)
    rows = []
    for comparison in (  # each begins when the rows of the last one are passed on
        partial(bench_experts, setting),
        partial(bench_graph, setting),
        partial(bench_serve, setting, has_answers=False),
        partial(bench_stages, setting, (stage,)),
    ):
        for row in comparison():
            rows.append(row)
            yield row
    yield from gpu_targets([row for row in rows if row.clock == "wall"])


def gpu_targets(rows: Sequence[BenchRow]) -> list[Claim]:
    """What is claimed of a GPU.

    Args:
        rows: Measured on one; what they lack is left without a value.
    """
    return [*_expert_targets(rows), *_first_token_targets(rows), _training_target(rows)]


def memory_check(device: torch.device) -> Claim:
    """Small cells of all implementations under compute-sanitizer: what leaves its tensors."""

    def result(errors: int | None, note: str) -> Claim:
        return Claim.judge("GPU: errors of compute-sanitizer memcheck", "<=", 0, errors, note)

    tool = shutil.which(SANITIZER)
    if tool is None:
        return result(None, f"not run: {SANITIZER} is not on the PATH")
    code = f"from mono_internvl.bench import gpu; gpu.run_small_cells({str(device)!r})"
    command = [tool, "--tool", "memcheck", sys.executable, "-c", code]
    # Every tensor by itself: what leaves it must not end in its neighbour unseen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        found = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SANITIZER_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return result(None, f"not finished within {SANITIZER_TIMEOUT_S} s")
    said = found.stdout + found.stderr
    summary = _SUMMARY.search(said)
    if summary is None or (found.returncode != 0 and int(summary[1]) == 0):
        return result(None, f"failed, status {found.returncode}: {said.strip()[-200:]}")
    return result(int(summary[1]), "small cells, forward and backward, all implementations")


def run_small_cells(device: str) -> None:
    """Every implementation once, both passes, on rows and widths that divide by no tile."""
    place = torch.device(device)
    for dtype in (torch.float32, torch.bfloat16):
        for name in runnable(torch.empty(1, 1, dtype=dtype, device=place)):
            largest_gap(name, Cell(37, 20, 40, 72), dtype, place)
            largest_gap(name, Cell(37, 20, 40), dtype, place)


def _expert_targets(rows: Sequence[BenchRow]) -> list[Claim]:
    dense, split, limits = [], [], []
    cells: dict[tuple[object, ...], dict[str, float]] = {}
    widths: set[str] = set()
    for row in rows:
        if row.what == FFN:
            widths.add(f"width {row.shapes['width']}, ffn width {row.shapes['ffn_width']}")
            key = (*row.shapes.values(), row.notes["pass"])
            cells.setdefault(key, {})[row.subject] = row.p50
    for key, times in cells.items():
        best = min(times[name] for name in IMPLEMENTATIONS if name in times and name != DENSE)
        dense.append(times[DENSE] / best)
        split.append(times[TWO] / best)
        if key[0] == 8192 and key[-1] == FORWARD:
            limits.append(times[LIMIT] / best)
    note = "; ".join(sorted(widths)) or NO_GPU
    mean = math.exp(sum(map(math.log, split)) / len(split)) if split else None
    return [
        Claim.judge("GPU: dense / the best", ">=", 1.75, min(dense, default=None), note),
        Claim.judge(
            "GPU: two FFNs on split rows / the best",
            ">=",
            0.97,
            min(split, default=None),
            note,
        ),
        Claim.judge("GPU: the same, geometric mean", ">=", 1.0, mean, note),
        Claim.judge(
            "GPU: the best's ratio to one product's rate, 8,192 rows, forward",
            ">=",
            0.75,
            min(limits, default=None),
            note,
        ),
    ]


def _first_token_targets(rows: Sequence[BenchRow]) -> list[Claim]:
    """Ours may take as much of the twin's time as it has of its operations."""
    found = {(row.shapes["visual_tokens"], row.subject): row for row in rows if row.what == FIRST}
    targets = []
    for tiles in IMAGE_TILES:
        visual = tiles * _TILE_TOKENS
        name = f"GPU: time to first token, monolithic / modular, {visual} visual tokens"
        ours, twin = found.get((visual, OURS)), found.get((visual, MODULAR))
        if ours is None or twin is None or not (ours.gflop and twin.gflop):
            targets.append(Claim(name, "<= FLOP ratio", None, None, NO_GPU))
            continue
        note = f"bound: ratio of operations; {ours.notes['users']} users, {ours.layers} layers"
        targets.append(Claim.judge(name, "<=", round(ours.gflop / twin.gflop, 3), ours.ratio, note))
    return targets


def _training_target(rows: Sequence[BenchRow]) -> Claim:
    """At the size of 2B, on a device whose peak is known."""
    name, note = "GPU: step of S1.1, 2B, share of the peak on operations owed", NO_GPU
    for row in rows:
        is_2b = (row.layers, row.shapes.get("width")) == (_2B.layers, _2B.width)
        if row.what == "train: stages" and "mfu" in row.notes and is_2b:
            note = ", ".join(
                f"{key} {row.notes[key]}" for key in ("samples", "tokens", "recompute", "attention")
            )
            return Claim.judge(name, ">=", 0.45, row.notes["mfu"], note)
    return Claim.judge(name, ">=", 0.45, None, note)
