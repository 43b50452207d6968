"""`bench targets`: what is claimed of a CPU, with its bound, measured at the middle size.

Like for like comes first: ours against transformers' Llama with the same attention, every row
computed. Then the best of each: ours with blocked attention and without the rows that nobody reads,
against Llama with sdpa, the faster of what transformers brings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from mono_internvl.attention.blocked import BLOCKED
from mono_internvl.bench import decode, prefill, train
from mono_internvl.bench.models import SIZES, Setting
from mono_internvl.bench.rows import BenchRow, Claim, device_name

MODULAR_TILES = (3, 7)
_ALIKE = {"sdpa": prefill.PLAIN, BLOCKED: prefill.BLOCKED_ONLY}
"""Attention -> the subject that attends so and computes every row."""
_2B = SIZES["2b"]
_OF_2B = f"2B, {_2B.layers} layers, bfloat16"
_CLAIMS_2B = (
    *((f"like for like: prefill / Llama, both {way}, {_OF_2B}", "<=", 1.03) for way in _ALIKE),
    (f"like for like: dense / ours, both sdpa, {_OF_2B}", ">=", 1.6),
    (f"best of each: prefill / Llama, {_OF_2B}", "<=", 0.90),
    (f"best of each: dense (sdpa) / ours, {_OF_2B}", ">=", 1.90),
)


def bench_targets(setting: Setting) -> Iterator[BenchRow | Claim]:
    """Run what the targets need, and judge them.

    In bf16 both dtypes are run; fp32 in more than twice as many rounds, as its bound like for like
    lies within 1 % of the ratio of operations, less than one round scatters. In fp32, which "auto"
    takes where bf16 products are slow, only what is claimed of fp32 is: the rest would take hours.

    Returns:
        The rows as they are measured, then the targets in the order in which they are claimed.
    """
    size, rounds = setting.size, setting.rounds
    fp32 = replace(setting, dtype=torch.float32, rounds=2 * rounds + 1)
    bf16 = replace(setting, dtype=torch.bfloat16)
    targets: list[Claim] = []
    short = (
        *(prefill.LLAMA, prefill.LLAMA_BLOCKED, prefill.PLAIN, prefill.BLOCKED_ONLY),
        *(prefill.BEST, prefill.DENSE),
    )
    where = f"{size.layers} layers, {size.tokens} tokens"

    def add(name: str, sign: str, bound: float, value: float | None, note: str = where) -> None:
        targets.append(Claim.judge(name, sign, bound, value, note, device_name(setting.device)))

    is_slow = setting.dtype == torch.float32
    for of_dtype, bound in ((fp32, 0.96),) if is_slow else ((fp32, 0.96), (bf16, 0.86)):
        is_bf16 = of_dtype is bf16
        found = prefill.bench_prefill(
            of_dtype,
            with_variants=is_bf16,
            only=(*short, prefill.NEWER) if is_bf16 else short,
        )
        yield from found
        for judged in _prefill_claims(found, "bfloat16" if is_bf16 else "float32", bound):
            add(*judged)
    if is_slow:
        yield from targets
        note = "not in fp32; mono-internvl bench targets --precision bf16"
        yield Claim(
            "what is claimed of bfloat16", "", None, None, note, device_name(setting.device)
        )
        return
    samples = train.training_size(size)
    found = train.bench_step(replace(bf16, size=samples, rounds=max(2, rounds - 3)))
    yield from found
    ours = next(row for row in found if row.subject == train.OURS)
    official = next(row for row in found if row.subject == train.OFFICIAL)
    where = f"{size.layers} layers, 2 x {samples.tokens} tokens, bfloat16"
    add("S1.1 step: dense as official / ours", ">=", 1.8, 1 / _ratio(found, train.OURS), where)
    memory = None
    if ours.notes["peak_bytes"] and official.notes["peak_bytes"]:
        memory = ours.notes["peak_bytes"] / official.notes["peak_bytes"]
    add("S1.1 peak memory: ours / dense as official", "<=", 0.75, memory, where)
    fewer = replace(bf16, rounds=max(2, rounds - 2))
    for tiles, bound in zip(MODULAR_TILES, (0.55, 0.52), strict=True):
        shape = replace(size, tiles=tiles)
        found = prefill.bench_modular(replace(fewer, size=shape))
        yield from found
        twins = [_ratio(found, name) for name in (prefill.MODULAR, prefill.MODULAR_SDPA)]
        value = _ratio(found, prefill.BEST) / min(twins)
        note = f"{size.layers} layers, the modular baseline at its best, bfloat16"
        name = f"time to first token: monolithic / modular, {shape.visual_tokens} + text tokens"
        add(name, "<=", bound, value, note)
    found = decode.bench_decode(bf16)
    yield from found
    ours_ratio = _ratio(found, decode.OURS)
    where = f"context {size.tokens}, {size.layers} layers, bfloat16, weights not packed"
    static = _ratio(found, decode.LLAMA_STATIC) / ours_ratio
    for attention, subject in (("sdpa", decode.OURS_SDPA), (BLOCKED, decode.OURS)):
        claim = f"like for like: decode tokens/s / Llama, dynamic cache, both {attention}"
        add(claim, ">=", 0.97, 1 / _like_for_like(found, subject), where)
    add("best of each: decode tokens/s / Llama, dynamic cache", ">=", 1.15, 1 / ours_ratio, where)
    add("best of each: decode tokens/s / Llama, static cache", ">=", 0.97, static, where)
    found = decode.bench_prefix(fewer)
    yield from found
    where = f"{decode.ANSWER_TOKENS} tokens an answer, {size.layers} layers, bfloat16"
    value = 1 / _ratio(found, decode.WITH)
    add("3 questions on one image: read each time / read once", ">=", 2.0, value, where)
    for name, sign, bound in _CLAIMS_2B:
        add(name, sign, bound, None, "takes longer; mono-internvl bench prefill --size 2b")
    yield from targets


def _prefill_claims(
    rows: Sequence[BenchRow], dtype: str, bound: float
) -> Iterator[tuple[str, str, float, float]]:
    """Claims of `bench prefill` in one dtype, with `bound` for the best of each."""
    for attention, subject in _ALIKE.items():
        claim = f"like for like: prefill / Llama, both {attention}, {dtype}"
        yield claim, "<=", 1.03, _like_for_like(rows, subject)
    dense = _like_for_like(rows, prefill.DENSE)
    yield f"like for like: dense / ours, both sdpa, {dtype}", ">=", 1.6, dense
    best = _ratio(rows, prefill.BEST)
    yield f"best of each: prefill / Llama, {dtype}", "<=", bound, best
    dense = _ratio(rows, prefill.DENSE) / best
    yield f"best of each: dense (sdpa) / ours, {dtype}", ">=", 1.85, dense
    if dtype == "bfloat16":
        claim = "best of each, every row computed: prefill / Llama, bfloat16"
        yield claim, "<=", 0.98, _ratio(rows, prefill.BLOCKED_ONLY)
        yield "v1.5 / v1 prefill, bfloat16", "<=", 1.03, _ratio(rows, prefill.NEWER) / best


def targets_of_2b(rows: Sequence[BenchRow]) -> list[Claim]:
    """What is claimed of a 2B model's prefill on a CPU, judged by rows of `bench prefill`.

    Returns:
        Nothing where the rows are of another size, depth, dtype or device.
    """
    first = rows[0]
    shown = (first.layers, first.shapes.get("width"), first.dtype, first.clock)
    if shown != (_2B.layers, _2B.width, "bfloat16", "cpu"):
        return []
    best, dense = (_ratio(rows, name) for name in (prefill.BEST, prefill.DENSE))
    alike = [_like_for_like(rows, subject) for subject in (*_ALIKE.values(), prefill.DENSE)]
    note = f"{first.shapes['tokens']} tokens"
    claims = zip(_CLAIMS_2B, (*alike, best, dense / best), strict=True)
    return [Claim.judge(*claim, value, note, first.device) for claim, value in claims]


def _like_for_like(rows: Sequence[BenchRow], subject: str) -> float:
    """A subject's time over that of its peer."""
    ratio = next(row.peer_ratio for row in rows if row.subject == subject)
    assert ratio is not None
    return ratio


def _ratio(rows: Sequence[BenchRow], subject: str) -> float:
    """A subject's time over the baseline's."""
    ratio = next(row.ratio for row in rows if row.subject == subject)
    assert ratio is not None
    return ratio
