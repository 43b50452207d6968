"""The engine's benchmark: every subject once, and its claim judged by the ratio of times."""

import dataclasses

import torch

from mono_internvl.bench import engine, samples
from mono_internvl.bench.models import Setting, size_of
from mono_internvl.bench.rows import BenchRow, Claim


def _setting(dtype: torch.dtype) -> Setting:
    return Setting(size_of("tiny"), dtype, torch.device("cpu"), 1, "mono-internvl bench engine")


def test_bench_engine_rows_are_of_tokens_and_in_fp32_of_products() -> None:
    found = list(engine.bench_engine(_setting(torch.float32)))
    subjects = [row.subject for row in found if isinstance(row, BenchRow)]
    assert subjects == [
        engine.ONE_BY_ONE,
        engine.ALONE,
        engine.TOGETHER,
        engine.ONE_ROW,
        engine.IN_ORDER,
        engine.WEIGHTS_FIRST,
    ]
    assert [row.unit for row in found if isinstance(row, BenchRow)][:3] == ["s/token"] * 3


def test_bench_engine_is_judged_by_the_ratio_of_times() -> None:
    rows = list(engine.bench_engine(_setting(torch.bfloat16)))
    assert len(rows) == 3
    for ratio, met in ((0.25, True), (0.5, False)):
        made = [
            dataclasses.replace(row, ratio=ratio)
            for row in rows
            if isinstance(row, BenchRow) and row.subject == engine.TOGETHER
        ]
        target = engine.target_of(made)
        assert isinstance(target, Claim)
        assert (target.value, target.met, target.target) == (1 / ratio, met, ">= 3")


def test_bench_samples_reads_the_prompt_once_or_with_each() -> None:
    rows = list(samples.bench_samples(_setting(torch.float32)))
    found = [row for row in rows if isinstance(row, BenchRow)]
    assert [row.subject for row in found] == [
        samples.SEPARATELY,
        samples.REREAD,
        samples.TOGETHER,
    ]
    for ratio, met in ((0.3, True), (0.5, False)):
        made = [dataclasses.replace(row, ratio=ratio) for row in found]
        assert samples.target_of(made).met is met
