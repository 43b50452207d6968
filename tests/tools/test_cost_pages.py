"""Memory and time of 2B, counted again by hand."""

from pathlib import Path

import pytest
from cost_pages import (
    CORES,
    GPUS,
    Machine,
    inference_block,
    sample_flops,
    state_bytes,
    training_block,
)

from mono_internvl.bench.rows import BENCH_ROWS, read_rows
from mono_internvl.cli.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = 3_111_355_392
"""Of the released 2B checkpoints."""
A_LAYER = 2048 * (2 * 2048 + 2 * 1024) + 3 * 2048 * 8192
"""Weights that one token meets in a layer: q and o, k and v, one feed-forward expert."""
HEAD = 2048 * 92_553
VISION = 12_595_200 - 3 * 2048 - 2 * 2048
"""Weights of the projector, without its norm and its biases."""


def _cells(block: str) -> list[list[str]]:
    lines = [line for line in block.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


@pytest.mark.parametrize(("row", "machine"), enumerate((*CORES, *GPUS)))
def test_inference_table_is_memory_and_time_counted_by_hand(row: int, machine: Machine) -> None:
    name, _, memory, first, further, _ = _cells(inference_block(ROOT))[row]
    assert name == machine.name
    size = machine.dtype.itemsize
    cache = 2 * 24 * 1024 * 8 * 128 * size  # keys and values, layers, tokens, heads, width
    assert float(memory.split()[0]) == pytest.approx((PARAMETERS * size + cache) / 1e9, abs=0.05)
    attention = 24 * 4 * 16 * 128 * 1024 * 1025 / 2
    patches = 2 * 3 * 1024 * (14 * 14 * 3 * 1024)
    prefill = 2 * 1024 * 24 * A_LAYER + attention + 2 * HEAD + patches + 2 * 768 * VISION
    assert _seconds(first) == pytest.approx(prefill / machine.rate, rel=0.01)
    read = (24 * A_LAYER + HEAD) * size + cache
    assert _seconds(further) == pytest.approx(read / machine.bandwidth, rel=0.01)


def _seconds(text: str) -> float:
    value, unit = text.split()
    return float(value) * {"s": 1.0, "ms": 1e-3}[unit]


def test_prefill_is_what_bench_counted() -> None:
    (row,) = {
        round(row.gflop or 0, 1)
        for row in read_rows(ROOT / "results" / BENCH_ROWS)
        if row.what == "prefill"
        and row.layers == 24
        and row.subject.startswith("ours v1, blocked")
        and not row.notes["last_layer_skip"]
    }
    linear = (2 * 1024 * 24 * A_LAYER + 2 * HEAD + 2 * 768 * VISION) / 1e9
    assert row == pytest.approx(linear, rel=2e-3)


def test_training_state_is_counted_by_hand() -> None:
    experts = 23 * 3 * 2048 * 8192  # the last layer's visual expert gets no gradient
    vision = 1_653_760 - 1024 + 12_595_200  # nor the class embedding
    s11, *_, s2 = RECIPES["evip-2b"].stages
    assert state_bytes("evip-2b", s11) == 4 * PARAMETERS + 12 * (experts + vision)
    assert state_bytes("evip-2b", s2) == 4 * PARAMETERS + 12 * (PARAMETERS - 3 * 2048 * 8192 - 1024)


def test_training_sample_is_about_three_forward_passes_where_all_is_trainable() -> None:
    sft = RECIPES["sft"].stages[0]
    attention = 24 * 4 * 16 * 128 * sft.max_tokens**2 / 2
    forward = 2 * sft.max_tokens * 24 * A_LAYER + attention
    assert sample_flops(sft) == pytest.approx(3 * forward, rel=0.05)
    s11 = RECIPES["evip-2b"].stages[0]
    forward = 2 * s11.max_tokens * 24 * A_LAYER
    assert 2 * forward < sample_flops(s11) < 3 * forward  # text weights get no gradient


def test_training_table_is_samples_times_operations() -> None:
    rows = _cells(training_block(ROOT))
    assert [row[0] for row in rows] == [
        *(f"`evip-2b` {stage.name}" for stage in RECIPES["evip-2b"].stages),
        "`sft` sft",
    ]
    for row, samples in zip(rows, (450_000 * 2048, 126_000 * 2048, 70_000 * 2048), strict=False):
        days = [float(cell.replace(",", "")) for cell in row[-2:]]
        flops = float(row[3].split()[0]) * 1e12
        for value, gpu in zip(days, GPUS, strict=True):
            assert value == pytest.approx(samples * flops / gpu.rate / 86_400, rel=0.01)
