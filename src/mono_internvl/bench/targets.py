"""`bench targets`: what is claimed of a CPU, with its bound, measured at the middle size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from mono_internvl.bench import decode, prefill, train
from mono_internvl.bench.models import Size
from mono_internvl.bench.rows import BenchRow, Target

TRAIN_TILE_PX, TRAIN_TILES, TRAIN_TEXT = 224, 6, 64
"""Two samples of 512 tokens, 384 of them visual."""
MODULAR_TILES = (3, 7)
_NOT_HERE = (
    ("prefill / Llama, 2B, 24 layers, bfloat16", "<=", 0.90, "bench prefill --size 2b"),
    ("dense (sdpa) / ours, 2B, 24 layers, bfloat16", ">=", 1.90, "bench prefill --size 2b"),
)


def training_size(size: Size) -> Size:
    """A size with the samples that training is measured on."""
    if size.name == "tiny":
        return size
    return dataclasses.replace(
        size,
        tile_px=TRAIN_TILE_PX,
        tiles=TRAIN_TILES,
        text_before=TRAIN_TEXT,
        text_after=TRAIN_TEXT,
    )


def bench_targets(
    size: Size, *, device: torch.device, rounds: int, command: str
) -> tuple[list[BenchRow], list[Target]]:
    """Run what the targets need, and judge them.

    Returns:
        The rows, and the targets in the order in which they are claimed.
    """
    fp32, bf16 = torch.float32, torch.bfloat16
    rows: list[BenchRow] = []
    targets: list[Target] = []
    short = (prefill.LLAMA, prefill.PLAIN, prefill.BEST, prefill.DENSE)
    where = f"{size.layers} layers, {size.tokens} tokens"

    def add(name: str, sign: str, bound: float, value: float | None, note: str = where) -> None:
        targets.append(Target.judge(name, sign, bound, value, note))

    for dtype, with_skip, without in ((fp32, 0.96, 1.03), (bf16, 0.86, 0.98)):
        only = short if dtype is fp32 else (*short, prefill.BLOCKED_ONLY, prefill.NEWER)
        found = prefill.bench_prefill(
            size,
            dtype=dtype,
            device=device,
            rounds=max(2, rounds - 2) if dtype is fp32 else rounds,
            command=command,
            with_variants=dtype is bf16,
            only=only,
        )
        rows += found
        name = str(dtype).removeprefix("torch.")
        best = _ratio(found, prefill.BEST)
        add(f"prefill / Llama, {name}", "<=", with_skip, best)
        plain = prefill.PLAIN if dtype is fp32 else prefill.BLOCKED_ONLY
        add(f"prefill without skip / Llama, {name}", "<=", without, _ratio(found, plain))
        add(f"dense (sdpa) / ours, {name}", ">=", 1.85, _ratio(found, prefill.DENSE) / best)
        if dtype is bf16:
            add("v1.5 / v1 prefill, bfloat16", "<=", 1.03, _ratio(found, prefill.NEWER) / best)
    steps = train.bench_train(
        training_size(size), dtype=bf16, device=device, rounds=max(2, rounds - 3), command=command
    )
    rows += steps
    ours = next(row for row in steps if row.subject == train.OURS)
    official = next(row for row in steps if row.subject == train.OFFICIAL)
    where = f"{size.layers} layers, 2 x {training_size(size).tokens} tokens, bfloat16"
    add("S1.1 step: dense as official / ours", ">=", 1.8, 1 / _ratio(steps, train.OURS), where)
    memory = None
    if ours.notes["peak_bytes"] and official.notes["peak_bytes"]:
        memory = ours.notes["peak_bytes"] / official.notes["peak_bytes"]
    add("S1.1 peak memory: ours / dense as official", "<=", 0.75, memory, where)
    for tiles, bound in zip(MODULAR_TILES, (0.55, 0.52), strict=True):
        shape = dataclasses.replace(size, tiles=tiles)
        found = prefill.bench_modular(
            shape, dtype=bf16, device=device, rounds=max(2, rounds - 2), command=command
        )
        rows += found
        twins = [_ratio(found, name) for name in (prefill.MODULAR, prefill.MODULAR_SDPA)]
        value = _ratio(found, prefill.BEST) / min(twins)
        note = f"{size.layers} layers, the twin at its best, bfloat16"
        name = f"time to first token: monolithic / modular, {shape.visual_tokens} + text tokens"
        add(name, "<=", bound, value, note)
    found = decode.bench_decode(size, dtype=bf16, device=device, rounds=rounds, command=command)
    rows += found
    ours_ratio = _ratio(found, decode.OURS)
    where = f"context {size.tokens}, {size.layers} layers, bfloat16, weights not packed"
    add("decode tokens/s / Llama, dynamic cache", ">=", 1.15, 1 / ours_ratio, where)
    static = _ratio(found, decode.LLAMA_STATIC)
    add("decode tokens/s / Llama, static cache", ">=", 0.97, static / ours_ratio, where)
    found = decode.bench_prefix(
        size, dtype=bf16, device=device, rounds=max(2, rounds - 2), command=command
    )
    rows += found
    where = f"{decode.ANSWER_TOKENS} tokens an answer, {size.layers} layers, bfloat16"
    value = 1 / _ratio(found, decode.WITH)
    add("3 questions on one image: read each time / read once", ">=", 2.0, value, where)
    for name, sign, bound, measured_by in _NOT_HERE:
        add(name, sign, bound, None, f"not within ten minutes; mono-internvl {measured_by}")
    return rows, targets


def _ratio(rows: Sequence[BenchRow], subject: str) -> float:
    """A subject's time over the baseline's."""
    ratio = next(row.ratio for row in rows if row.subject == subject)
    assert ratio is not None
    return ratio
