"""`bench experts`: what a cell holds and what is checked."""

import dataclasses
import functools

import pytest
import torch
import toy_experts

from mono_internvl.bench import dense
from mono_internvl.bench import experts as bench
from mono_internvl.bench.dense import DENSE
from mono_internvl.bench.experts import Cell
from mono_internvl.bench.models import Setting, size_of
from mono_internvl.bench.timing import Subject, interleaved
from mono_internvl.experts import registry

CPU = torch.device("cpu")
CELL = Cell(40, 24, 16, 24)


def _rows(passes: str, cell: Cell = CELL) -> list[bench.BenchRow]:
    return bench.bench_cell(cell, passes, _setting(2))


def _setting(rounds: int) -> Setting:
    return Setting(size_of("tiny"), torch.float32, CPU, rounds, "mono-internvl bench")


@pytest.mark.parametrize("passes", [bench.FORWARD, bench.BOTH])
def test_cell_has_every_subject_and_counts_its_products(passes: str) -> None:
    rows = {row.subject: row for row in _rows(passes)}
    assert list(rows) == [bench.LIMIT, bench.ONE, bench.TWO, "eager", DENSE]
    one_pass = 6 * 40 * 16 * 24 / 1e9
    owed = one_pass * (1 if passes == bench.FORWARD else 3)
    for name, row in rows.items():
        expected = 2 * owed if name == DENSE else owed
        assert row.gflop == pytest.approx(expected), name
        assert row.n == 2 and row.baseline == bench.ONE and row.notes["pass"] == passes
    assert rows["eager"].shapes == CELL.shapes


@pytest.mark.parametrize("passes", [bench.FORWARD, bench.BOTH])
def test_projections_are_a_comparison_of_their_own(passes: str) -> None:
    cell = Cell(40, 24, 16)
    rows = {row.subject: row for row in _rows(passes, cell)}
    assert list(rows)[:3] == [bench.LIMIT, bench.ONE_PROJECTION, bench.TWO_PROJECTIONS]
    owed = 2 * 40 * 16 * 16 / 1e9 * (1 if passes == bench.FORWARD else 3)
    for name, row in rows.items():
        assert row.gflop == pytest.approx(2 * owed if name == DENSE else owed), name
        assert row.what == bench.PROJECTION and row.baseline == bench.ONE_PROJECTION
    assert rows["eager"].shapes == {"tokens": 40, "visual_tokens": 24, "width": 16}


@pytest.mark.parametrize("passes", [bench.FORWARD, bench.BOTH])
def test_fused_kernels_count_the_products_of_eager(
    passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    entry = dataclasses.replace(registry._ENTRIES["triton"], devices=("meta",))
    monkeypatch.setitem(registry._ENTRIES, "triton", entry)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # "meta" is unknown to it
    experts = bench.Experts.random(CELL, passes, torch.float32, torch.device("meta"))
    ways = {path: functools.partial(experts.by, path) for path in ("eager", "triton")}
    ways["sorted"] = functools.partial(experts.by_sorted, "triton")
    subjects = [Subject(name, functools.partial(experts.run, way)) for name, way in ways.items()]
    timings = interleaved(subjects, 1, CPU)
    owed = 6 * 40 * 16 * 24 / 1e9 * (1 if passes == bench.FORWARD else 3)
    for name in ways:
        assert timings[name].gflop == pytest.approx(owed), name


def test_split_rows_stay_split() -> None:
    experts = bench.Experts.random(CELL, bench.BOTH, torch.float32, CPU)
    text, visual, *gradients = experts.run(experts.of_two)
    assert text is not None and visual is not None
    assert (len(text), len(visual)) == (16, 24)
    expected = experts.run(lambda: torch.cat(experts.of_two()))
    assert torch.equal(torch.cat((text, visual)), expected[0])
    for ours, theirs in zip(gradients, expected[1:], strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_routing_of_a_cell_has_its_visual_rows() -> None:
    routing = CELL.routing(CPU)
    assert (routing.num_text, routing.num_visual) == (16, 24)
    assert routing.visual_rows is not None and routing.visual_rows.tolist() == list(range(4, 28))


def test_check_rejects_swapped_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(check.met for check in bench.check_implementations(torch.float32, CPU))
    blend = dense._blend
    monkeypatch.setattr(dense, "_blend", lambda text, visual, routing: blend(visual, text, routing))
    (check,) = bench.check_implementations(torch.float32, CPU)
    assert check.name.startswith(DENSE) and not check.met


@pytest.mark.parametrize("cell", [CELL, Cell(40, 24, 16)], ids=["ffn", "projection"])
def test_rows_kept_sorted_give_the_same_rows(cell: Cell) -> None:
    experts = bench.Experts.random(cell, bench.FORWARD, torch.float32, CPU)
    order, toy = experts.routing.sorted_rows, toy_experts.register()
    assert order is not None
    by_rows = dataclasses.replace(experts, x=experts.x[order])
    with torch.no_grad():
        assert torch.allclose(by_rows.by_sorted(toy), experts.by("eager")[order], atol=1e-5)
        assert not torch.allclose(experts.by_sorted(toy), experts.by("eager"), atol=1e-2)
