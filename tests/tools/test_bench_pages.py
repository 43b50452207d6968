"""The tables of docs/performance.md say what the rows say."""

import dataclasses
import json
from pathlib import Path

import made_up
import pytest
import torch
from bench_pages import (
    NOTHING,
    comparison_block,
    experts_block,
    llama_block,
    profile_block,
    targets_block,
)

from mono_internvl.bench.experts import FORWARD, ONE, ONE_PROJECTION, Cell, bench_cell
from mono_internvl.bench.models import Setting, size_of
from mono_internvl.bench.profile import PROFILED, bench_profile
from mono_internvl.bench.rows import BenchRow, Claim, keep
from mono_internvl.bench.timing import Subject, measure
from mono_internvl.errors import ConfigError


def test_tables_show_the_rows(tmp_path: Path) -> None:
    a = torch.ones(64, 64)
    rows = measure(
        "prefill",
        [Subject("one", lambda: a @ a, {"skip": True}), Subject("two", lambda: (a @ a) @ a)],
        Setting(
            size_of("tiny"), torch.float32, torch.device("cpu"), 1, "mono-internvl bench prefill"
        ),
        baseline="one",
        shapes={"visual_tokens": 768},
        layers=8,
    )
    list(keep(tmp_path, rows))
    text = comparison_block("prefill")(tmp_path)
    assert "(8 layers, visual tokens 768)" in text and "skip yes" in text
    assert f"{rows[1].p50:.4g} s" in text and f"| {rows[1].ratio:.2f} |" in text
    assert ", 2.00 |" in text  # twice the multiplications
    assert rows[0].commit in text and rows[0].date in text
    assert comparison_block("decode")(tmp_path) == NOTHING


def test_expert_layers_are_a_line_for_a_cell(tmp_path: Path) -> None:
    assert experts_block(tmp_path) == NOTHING
    setting = Setting(
        size_of("tiny"), torch.float32, torch.device("cpu"), 1, "mono-internvl bench experts"
    )
    cells = [Cell(tokens, tokens // 4, 32, 64) for tokens in (24, 40)]
    rows = [row for cell in cells for row in bench_cell(cell, FORWARD, setting)]
    list(keep(tmp_path, rows))
    text = experts_block(tmp_path)
    head, _, *lines = (line.strip("| ") for line in text.splitlines()[: 2 + len(cells)])
    columns = head.split(" | ")
    for cell, line in zip(cells, lines, strict=True):
        values = line.split(" | ")
        assert f"{cell.tokens}, {cell.visual_tokens}" in values
        of_cell = {r.subject: r for r in rows if r.shapes["tokens"] == cell.tokens}
        assert values[columns.index("dense")] == f"{of_cell['dense'].ratio:.2f}"
        assert values[columns.index(ONE)] == f"{1e3 * of_cell[ONE].p50:.4g} ms"
    assert text.count("`mono-internvl bench experts`") == 1
    list(keep(tmp_path, bench_cell(Cell(40, 10, 32), FORWARD, setting)))
    assert f"| {ONE_PROJECTION} |" in experts_block(tmp_path)
    assert text.splitlines()[:4] == experts_block(tmp_path).splitlines()[:4]


def _bench_row(subject: str, ratio: float, attention: str, **changes: object) -> BenchRow:
    notes = {"attention": attention, "last_layer_skip": subject.endswith("skip")}
    row = dataclasses.replace(
        made_up.ROW, what="prefill", subject=subject, ratio=ratio, notes=notes, clock="cpu"
    )
    return dataclasses.replace(row, shapes={"width": 8}, baseline="Llama, sdpa", **changes)  # type: ignore[arg-type]


def test_llama_is_met_like_for_like_first(tmp_path: Path) -> None:
    assert llama_block(tmp_path) == NOTHING
    rows = [
        _bench_row("Llama, sdpa", 1.0, "sdpa"),
        _bench_row("Llama, blocked", 0.75, "blocked"),
        _bench_row("ours v1, sdpa", 1.02, "sdpa", peer="Llama, sdpa", peer_ratio=1.01),
        _bench_row("ours v1, sdpa, skip", 0.9, "sdpa", peer="Llama, sdpa", peer_ratio=0.9),
        _bench_row("ours v1, blocked, skip", 0.6, "blocked", peer="Llama, blocked", peer_ratio=0.8),
        _bench_row("ours v1, blocked", 0.78, "blocked", peer="Llama, blocked", peer_ratio=1.04),
        _bench_row("dense v1, sdpa", 1.8, "sdpa", peer="ours v1, sdpa", peer_ratio=1.75),
        _bench_row("ours v1.5, blocked, skip", 0.1, "blocked"),  # another model
    ]
    list(keep(tmp_path, rows))
    text = llama_block(tmp_path)
    assert "| both sdpa | both blocked | best of each |" in text
    assert "| 1.01 | 1.04 | 0.60 | 1.75 | made up |" in text


def test_llama_of_older_rows_is_compared_where_attention_is_the_same(tmp_path: Path) -> None:
    rows = [
        _bench_row("Llama, sdpa", 1.0, "sdpa"),
        _bench_row("ours v1", 1.02, "sdpa"),
        _bench_row("ours v1, blocked", 0.78, "blocked"),  # there was no Llama like it
    ]
    list(keep(tmp_path, rows))
    text = llama_block(tmp_path)
    assert "both blocked" not in text and "| 1.02 | 0.78 | made up |" in text


def test_profiles_stand_side_by_side(tmp_path: Path) -> None:
    assert profile_block(tmp_path) == NOTHING
    command = "mono-internvl bench profile"
    setting = Setting(size_of("tiny"), torch.float32, torch.device("cpu"), 1, command)
    rows = list(bench_profile(setting))
    list(keep(tmp_path, rows))
    text = profile_block(tmp_path)
    head, _, total, *_ = (line.strip("| ") for line in text.splitlines())
    assert head.split(" | ")[1:] == list(PROFILED)
    assert total.split(" | ")[1] == f"{rows[0].p50:.3g} s, 100.0 %"
    (convolution,) = (line for line in text.splitlines() if line.startswith("| convolution"))
    assert convolution.split(" | ")[1] == ""  # a plain language model has none


def test_targets_show_misses(tmp_path: Path) -> None:
    assert targets_block(tmp_path) == NOTHING
    file = tmp_path / "targets.jsonl"
    targets = [Claim.judge("a", "<=", 1.0, 2.0), Claim.judge("b", ">=", 1.0, None, "needs a GPU")]
    list(keep(tmp_path, targets))
    on_another = Claim.judge("a", "<=", 1.0, 0.5, "", "a laptop")
    list(keep(tmp_path, [on_another]))
    text = targets_block(tmp_path)
    assert "**a laptop**\n\n| claim | target | measured | met |" in text
    assert "| a | ≤ 1 | 2.00 | **no** |" in text
    assert "| b | ≥ 1 | not measured |  | needs a GPU |" in text
    file.write_text(json.dumps({"name": "a"}))
    with pytest.raises(ConfigError, match=r"targets\.jsonl"):
        targets_block(tmp_path)
