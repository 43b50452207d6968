"""`bench gpu`: no made-up value, every claim judged, and a rehearsal of the whole on a CPU."""

import dataclasses
import os
import stat
from pathlib import Path

import pytest
import torch
from made_up import ROW

from mono_internvl.bench import experts, gpu, serve
from mono_internvl.bench.experts import Cell
from mono_internvl.bench.models import Setting, size_of
from mono_internvl.bench.rows import BenchRow, Claim
from mono_internvl.bench.run import COMPARISONS, bench
from mono_internvl.recipes.evip import EVIP

CPU = torch.device("cpu")
CLAIMS = 8


def test_gpu_targets_are_empty_without_a_gpu() -> None:
    found = list(bench("gpu", size="middle"))
    assert len(found) == CLAIMS
    assert all(isinstance(t, Claim) and t.value is None and t.met is None for t in found)
    assert all(isinstance(t, Claim) and "CUDA" in t.note for t in found)


def test_rehearsal_on_a_cpu_runs_everything_and_judges_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    found = list(bench("gpu", size="tiny", precision="fp32", rounds=1))
    rows = [row for row in found if isinstance(row, BenchRow)]
    assert {row.what for row in rows} == {
        "experts",
        "experts: projection",
        "decode: static cache",
        "serve: first token",
        "train: stages",
    }
    targets = [row for row in found if isinstance(row, Claim)]
    (check, *equal), claims = targets[:-CLAIMS], targets[-CLAIMS:]
    assert check.value is None and "not on the PATH" in check.note
    assert len(equal) == 2 and all(t.met for t in equal)
    assert all(t.value is None and t.met is None for t in claims)


def test_comparisons_begin_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    row = dataclasses.replace(ROW, clock="cpu")  # no claim is judged by it
    for name in ("bench_experts", "bench_graph", "bench_serve", "bench_stages"):
        monkeypatch.setattr(
            gpu, name, lambda *args, name=name, **kwargs: begun.append(name) or [row]
        )
    monkeypatch.setattr(gpu, "memory_check", lambda device: row)
    monkeypatch.setattr(gpu, "check_implementations", lambda dtype, device: [])
    setting = Setting(size_of("tiny"), torch.float32, CPU, 1, "none")
    counts = [len(begun) for found in gpu.bench_gpu(setting, EVIP.stages[0]) if found is row]
    assert counts == [0, 1, 2, 3, 4]


def test_one_command_takes_the_gpu_and_the_shapes_of_2b(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: list[Setting] = []
    for name in ("gpu", "prefill"):
        monkeypatch.setitem(COMPARISONS, name, lambda setting: settings.append(setting) or [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda index: None, raising=False)
    assert not list(bench("gpu", precision="bf16")) + list(bench("prefill"))
    assert [(s.size.name, s.device.type) for s in settings] == [("2b", "cuda"), ("middle", "cpu")]


def test_expert_targets_take_the_best_path_of_each_cell() -> None:
    times = {experts.LIMIT: 0.8, experts.TWO: 1.0, "eager": 1.2, "triton": 1.0}
    cells = {256: {experts.TWO: 0.5}, 8192: {"dense": 1.9}, 32768: {experts.LIMIT: 0.1}}
    rows = [
        dataclasses.replace(
            ROW,
            subject=subject,
            p50=p50,
            shapes=Cell(n, n // 2, 8, 8).shapes,
            notes={"pass": experts.FORWARD},
        )
        for n, changed in cells.items()
        for subject, p50 in {**times, "dense": 2.0, **changed}.items()
    ]
    targets = gpu.gpu_targets(rows)
    assert all(target.note == "width 8, ffn width 8" for target in targets[:4])
    values = [target.value for target in targets]
    assert values[:4] == [1.9, 0.5, pytest.approx(0.5 ** (1 / 3), abs=1e-4), 0.8]
    assert values[4:] == [None] * 4


def test_first_tokens_are_held_to_the_ratio_of_operations() -> None:
    rows = [
        dataclasses.replace(
            ROW,
            what=serve.FIRST,
            subject=subject,
            shapes={"visual_tokens": 768},
            gflop=gflop,
            ratio=ratio,
            notes={"users": 16},
        )
        for subject, gflop, ratio in ((serve.OURS, 60.0, 0.61), (serve.MODULAR, 100.0, 1.0))
    ]
    judged = gpu.gpu_targets(rows)[4:7]
    assert [(t.target, t.value, t.met) for t in judged] == [
        ("<= 0.6", 0.61, False),
        ("<= FLOP ratio", None, None),
        ("<= FLOP ratio", None, None),
    ]


def test_training_is_judged_at_2b_only() -> None:
    notes = {"mfu": 0.5, "samples": 8, "tokens": 1425, "recompute": "none", "attention": "sdpa"}
    row = dataclasses.replace(ROW, what="train: stages", shapes={"width": 1024}, notes=notes)
    assert gpu.gpu_targets([row])[-1].value is None
    wide = dataclasses.replace(row, shapes={"width": 2048})
    assert gpu.gpu_targets([wide])[-1].value is None  # of too few layers
    judged = gpu.gpu_targets([dataclasses.replace(wide, layers=24)])[-1]
    assert judged.met and judged.value == 0.5 and "tokens 1425" in judged.note


def _check_by(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Claim:
    """The memory check with a shell script in place of the tool."""
    tool = folder / gpu.SANITIZER
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return gpu.memory_check(CPU)


def test_memory_check_runs_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What stands behind the two options is run, as the real tool does.
    script = 'shift 2; "$@" || exit 7; echo ERROR SUMMARY: 0 errors'
    found = _check_by(script, tmp_path, monkeypatch)
    assert found.value == 0 and found.met


@pytest.mark.parametrize(
    ("script", "value", "said"),
    [
        ("echo ERROR SUMMARY: 3 errors; exit 1", 3, "small cells"),
        ("echo ERROR SUMMARY: 0 errors; exit 7", None, "status 7"),
        ("echo cannot attach", None, "cannot attach"),
    ],
)
def test_memory_check_that_finds_errors_or_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, value: int | None, said: str
) -> None:
    found = _check_by(script, tmp_path, monkeypatch)
    assert found.value == value and not found.met and said in found.note


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_bench_judges_every_claim_of_the_experts() -> None:
    setting = Setting(size_of("tiny"), torch.bfloat16, torch.device("cuda"), 2, "none")
    rows = [
        row
        for passes in (experts.FORWARD, experts.BOTH)
        for row in experts.bench_cell(Cell(8192, 6144, 256, 512), passes, setting)
    ]
    assert all(target.value for target in gpu.gpu_targets(rows)[:4])
    assert all(row.clock == "wall" and row.p50 > 0 for row in rows)
