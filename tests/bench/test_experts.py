"""`bench experts` and `bench gpu`: what a cell holds, what is checked, and no made-up value."""

import dataclasses

import pytest
import torch
from torch import Tensor

from mono_internvl.bench import experts as bench
from mono_internvl.bench.experts import Cell
from mono_internvl.bench.models import size_of
from mono_internvl.experts import grouped

CPU = torch.device("cpu")
CELL = Cell(40, 24, 16, 24)


def _rows(passes: str, cell: Cell = CELL) -> list[bench.BenchRow]:
    return bench.bench_cell(
        cell, passes, dtype=torch.float32, device=CPU, rounds=2, command="mono-internvl bench"
    )


@pytest.mark.parametrize("passes", [bench.FORWARD, bench.BOTH])
def test_cell_has_every_subject_and_counts_its_products(passes: str) -> None:
    rows = {row.subject: row for row in _rows(passes)}
    assert list(rows) == [bench.LIMIT, bench.ONE, bench.TWO, "eager", "grouped", "dense"]
    one_pass = 6 * 40 * 16 * 24 / 1e9
    owed = one_pass * (1 if passes == bench.FORWARD else 3)
    for name, row in rows.items():
        expected = 2 * owed if name == "dense" else owed
        assert row.gflop == pytest.approx(expected), name
        assert row.n == 2 and row.baseline == bench.ONE and row.notes["pass"] == passes
    assert rows["eager"].shapes == CELL.shapes


def test_routing_of_a_cell_has_its_visual_rows() -> None:
    routing = CELL.routing(CPU)
    assert (routing.num_text, routing.num_visual) == (16, 24)
    assert routing.visual_rows is not None and routing.visual_rows.tolist() == list(range(4, 28))


def test_check_rejects_swapped_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(check.met for check in bench.check_paths(torch.float32, CPU))
    right = grouped._products

    def wrong(
        x: Tensor, n: int, text: Tensor, visual: Tensor, *rest: Tensor, **on: Tensor
    ) -> Tensor:
        return right(x, n, visual, text, *rest, **on)

    monkeypatch.setattr(grouped, "_products", wrong)
    met = {check.name.split()[0]: check.met for check in bench.check_paths(torch.float32, CPU)}
    assert met == {"grouped": False, "dense": True}


def test_gpu_targets_are_empty_without_a_gpu() -> None:
    size = size_of("tiny")
    found = bench.bench_gpu(size, dtype=torch.bfloat16, device=CPU, rounds=1, command="none")
    assert len(found) == 4
    assert all(t.value is None and t.met is None and "CUDA" in t.note for t in found)


def test_gpu_targets_take_the_best_path_of_each_cell() -> None:
    times = {bench.LIMIT: 0.8, bench.TWO: 1.0, "eager": 1.2, "grouped": 1.1, "triton": 1.0}
    cells = {256: {bench.TWO: 0.5}, 8192: {"dense": 1.9}, 32768: {bench.LIMIT: 0.1}}
    (row, *_) = _rows(bench.FORWARD)
    rows = [
        dataclasses.replace(row, subject=subject, p50=p50, shapes=Cell(n, n // 2, 8, 8).shapes)
        for n, changed in cells.items()
        for subject, p50 in {**times, "dense": 2.0, **changed}.items()
    ]
    values = [target.value for target in bench.gpu_targets(rows)]
    assert values == [1.9, 0.5, pytest.approx(0.5 ** (1 / 3), abs=1e-4), 0.8]
