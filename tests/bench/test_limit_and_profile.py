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
        SETTING,
        with_variants=False,
        only=(
            *(prefill.LLAMA, prefill.LLAMA_BLOCKED, prefill.PLAIN, prefill.BLOCKED_ONLY),
            *(prefill.BEST, prefill.DENSE),
        ),
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
    ratios = {prefill.BEST: 0.8, prefill.DENSE: 1.7}
    alike = {prefill.PLAIN: 1.01, prefill.BLOCKED_ONLY: 1.25, prefill.DENSE: 1.75}
    of_2b = [
        dataclasses.replace(
            row,
            layers=24,
            dtype="bfloat16",
            shapes={**row.shapes, "width": 2048},
            ratio=ratios.get(row.subject, 1.0),
            peer_ratio=alike.get(row.subject),
        )
        for row in rows
    ]
    judged = targets_of_2b(of_2b)
    assert [target.value for target in judged] == [1.01, 1.25, 1.75, 0.8, 2.125]
    assert [target.met for target in judged] == [True, False, True, True, True]
    assert {target.device for target in judged} == {rows[0].device}
    for wrong in ({"layers": 8}, {"dtype": "float32"}, {"clock": "wall"}):
        assert targets_of_2b([dataclasses.replace(row, **wrong) for row in of_2b]) == []
