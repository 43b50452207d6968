"""`bench data` in a small form: what its rows say, and the lengths that packing is tried with."""

from __future__ import annotations

import pytest
import torch

from mono_internvl.bench import data as bench_data_module
from mono_internvl.bench.data import as_released, bench_data, fewest_rows
from mono_internvl.bench.images import jpeg
from mono_internvl.bench.length_mixes import MIXES, lengths
from mono_internvl.bench.models import Setting, size_of
from mono_internvl.data.packing import pack
from mono_internvl.processing.images import MonoInternVLImageProcessor
from mono_internvl.recipes.evip import EVIP


def test_rows_say_memory_packing_and_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "_LISTED": 3,
        "_LINES": 2000,
        "_DRAWN": 50,
        "_STEPS": 1,
        "_PEER_PACKS": (2, 5),
        "_SIDES_PX": ((96, 64),),
    }.items():
        monkeypatch.setattr(bench_data_module, name, value)
    setting = Setting(size_of("tiny"), torch.float32, torch.device("cpu"), 1, "none")
    rows = list(bench_data(setting, EVIP.stages[3:]))
    by_name = {(row.what, row.subject): row for row in rows}
    memory = [row for row in rows if row.what == "data: memory"]
    assert [row.notes["records"] for row in memory] == [3000, 2000]
    assert all(10 < row.p50 < 1000 for row in memory)
    assert {row.unit for row in rows if row.what == "data: drawing"} == {"records/s"}
    for capacity in (8192, 16384):
        row = by_name["data: packing", f"s2, rows of {capacity:,}, slots used"]
        assert row.notes["fewest_rows_possible"] <= row.notes["rows"] and 0.9 < row.p50 <= 1
    decoding = [row for row in rows if row.what == "data: decoding"]
    assert decoding[0].ratio == 1.0 and len(decoding) == 3


@pytest.mark.parametrize("stage", EVIP.stages, ids=lambda stage: stage.name)
def test_rows_of_the_stages_are_full(stage: object) -> None:
    drawn = lengths(stage, stage.batch_size)  # type: ignore[arg-type,attr-defined]
    assert drawn == lengths(stage, stage.batch_size)  # type: ignore[arg-type,attr-defined]
    assert max(drawn) <= stage.max_tokens  # type: ignore[attr-defined]
    # Samples of S2 fill more than half of 8,192, and no packing does better there.
    capacity = 16_384 if stage.name == "s2" else 8192  # type: ignore[attr-defined]
    assert sum(drawn) / (len(pack(drawn, capacity)) * capacity) >= 0.97
    assert sum(kind.ratio for kind in MIXES[stage.name]) == pytest.approx(1)  # type: ignore[attr-defined]


def test_no_packing_goes_below_the_bound() -> None:
    assert fewest_rows([6, 6, 6, 4], 10) == 3
    assert fewest_rows([6, 6, 6, 5], 10) == 4
    assert fewest_rows([3] * 7, 10) == 3
    drawn = lengths(EVIP.stages[3], 200)
    assert fewest_rows(drawn, 8192) <= len(pack(drawn, 8192)) <= fewest_rows(drawn, 8192) + 2


def test_released_way_gives_the_exact_pixels() -> None:
    processor, file = MonoInternVLImageProcessor(image_size=112), jpeg(300, 200, 0)
    expected = processor([file], max_tiles=6)["pixel_values"]
    torch.testing.assert_close(as_released(processor, file), expected, rtol=1e-5, atol=1e-5)


def test_steps_of_equal_packs_of_a_streaming_packer_hold_uneven_numbers_of_samples() -> None:
    """Why packing is not left to Grain: a step has to hold its published number of samples."""
    grain = pytest.importorskip("grain")
    import numpy as np
    from grain.experimental import FirstFitPackIterDataset

    drawn = lengths(EVIP.stages[0], 2000)
    samples = grain.MapDataset.source([{"ids": np.ones(n, np.int32)} for n in drawn])
    packed = iter(
        FirstFitPackIterDataset(
            samples.to_iter_dataset(), length_struct={"ids": 8192}, num_packing_bins=8
        )
    )
    counts = [sum(int(next(packed)["ids_segment_ids"].max()) for _ in range(25)) for _ in range(4)]
    assert len(set(counts)) > 1, counts
