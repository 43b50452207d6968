"""What stands beside a time: the rate of one large product, and where the time went."""

import dataclasses

import pytest
import torch

from mono_internvl.bench import prefill
from mono_internvl.bench.limit import GEMM, against_one_product
from mono_internvl.bench.models import Setting, size_of
from mono_internvl.bench.profile import ALL, PROFILED, bench_profile
from mono_internvl.bench.rows import BenchRow
from mono_internvl.bench.targets import targets_of_2b
from mono_internvl.errors import ConfigError

SETTING = Setting(
    size_of("tiny"), torch.float32, torch.device("cpu"), 1, "mono-internvl bench profile"
)


@pytest.fixture(scope="module")
def rows() -> list[BenchRow]:
    return prefill.bench_prefill(
        SETTING, with_variants=False, only=(prefill.LLAMA, prefill.BEST, prefill.DENSE)
    )


def test_share_is_of_the_rate_of_one_product(rows: list[BenchRow]) -> None:
    assert GEMM not in {row.subject for row in rows}
    assert all(row.notes["share_of_gemm_rate"] > 0 for row in rows)
    limit = dataclasses.replace(rows[0], subject=GEMM, gflop=100.0, p50=1.0)
    half = dataclasses.replace(rows[0], gflop=100.0, p50=2.0)
    (judged,) = against_one_product([limit, half])
    assert judged.notes["share_of_gemm_rate"] == 0.5
    assert judged.notes["attention"] == "sdpa"


def test_profile_says_where_all_of_the_time_went() -> None:
    found = list(bench_profile(SETTING))
    tables = dict.fromkeys(row.what for row in found)
    assert list(tables) == [f"profile: {name}" for name in PROFILED]
    for table in tables:
        first, *kinds = (row for row in found if row.what == table)
        assert first.subject == ALL and first.p50 > 0
        assert sum(row.p50 for row in kinds) == pytest.approx(first.p50)
        assert sum(row.ratio or 0 for row in kinds) == pytest.approx(1)
        assert {"products of weights", "attention"} <= {row.subject for row in kinds}
    convolutions = {row.what for row in found if row.subject == "convolution"}
    assert convolutions == set(tables) - {f"profile: {prefill.LLAMA}"}


def test_profile_refuses_what_it_cannot_watch() -> None:
    with pytest.raises(ConfigError, match=r"device='cuda:0'; .*device='cpu'"):
        next(bench_profile(dataclasses.replace(SETTING, device=torch.device("cuda:0"))))


def test_2b_is_judged_by_rows_of_its_size_only(rows: list[BenchRow]) -> None:
    assert targets_of_2b(rows) == []
    ratios = {prefill.LLAMA: 1.0, prefill.BEST: 0.8, prefill.DENSE: 1.7}
    of_2b = [
        dataclasses.replace(
            row,
            layers=24,
            dtype="bfloat16",
            shapes={**row.shapes, "width": 2048},
            ratio=ratios[row.subject],
        )
        for row in rows
    ]
    first, second = targets_of_2b(of_2b)
    assert (first.value, first.met) == (0.8, True)
    assert (second.value, second.met) == (2.125, True)
    for wrong in ({"layers": 8}, {"dtype": "float32"}, {"clock": "wall"}):
        assert targets_of_2b([dataclasses.replace(row, **wrong) for row in of_2b]) == []
