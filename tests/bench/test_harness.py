"""The harness: interleaving, ratios, rows that say where they come from."""

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import made_up
import pytest
import torch
from filelock import FileLock
from typer.testing import CliRunner

from mono_internvl import compute
from mono_internvl.bench.models import Setting, size_of
from mono_internvl.bench.rows import (
    LOCK,
    BenchRow,
    Claim,
    check_folder,
    device_name,
    instructions,
    keep,
    read_rows,
)
from mono_internvl.bench.run import COMPARISONS, bench
from mono_internvl.bench.timing import Subject, interleaved, measure, percentile, repeats_for
from mono_internvl.bench.train import peak_bytes
from mono_internvl.cli.app import app
from mono_internvl.errors import ConfigError

CPU = torch.device("cpu")
ELSEWHERE = {"targets", "experts", "gpu", "data"}
"""Comparisons whose rows are of another form, with tests of their own."""

ROW = replace(made_up.ROW, what="a", subject="b \u2028 \u00e9")
LINE = f"{ROW.to_json()}\n".encode()

torch.set_num_threads(1)


def _burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_subjects_take_turns_and_begin_in_turn() -> None:
    order: list[str] = []
    subjects = [Subject(name, lambda name=name: order.append(name)) for name in "abc"]
    timings = interleaved(subjects, 3, CPU)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert all(len(t.cpu) == len(t.wall) == 3 for t in timings.values())


def test_measured_ratio_is_that_of_the_work() -> None:
    rows = measure(
        "burning",
        [
            Subject("one", lambda: _burn(0.01), peer="not measured"),
            Subject("two", lambda: _burn(0.04), units=2),
            Subject("like two", lambda: _burn(0.02), peer="two"),
        ],
        Setting(size_of("tiny"), torch.float32, CPU, 3, "none"),
        baseline="one",
        shapes={"tokens": 1},
        layers=0,
    )
    one, two, like_two = rows
    assert one.ratio == 1.0 and two.ratio == pytest.approx(2.0, rel=0.2)
    assert one.peer is one.peer_ratio is two.peer is None
    assert like_two.peer == "two" and like_two.peer_ratio == pytest.approx(1.0, rel=0.2)
    assert two.p20 <= two.p50 <= two.p80
    assert two.p50 == pytest.approx(0.02, rel=0.2)  # of one of its two units
    assert two.n == 3 and two.clock == "cpu" and two.commit and two.versions["torch"]


def test_multiplications_are_counted() -> None:
    x, w = torch.randn(8, 16), torch.randn(16, 32)
    # What comes before a run is neither timed nor counted.
    timings = interleaved([Subject("mm", lambda: x @ w, before=lambda: w @ w.T)], 1, CPU)
    assert timings["mm"].gflop == pytest.approx(2 * 8 * 16 * 32 / 1e9)


def test_percentile_interpolates() -> None:
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert percentile([0.0, 10.0], 0.2) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("sign", "bound", "value", "met"),
    [
        ("<=", 1.0, 0.9, True),
        ("<=", 1.0, 1.1, False),
        (">=", 2.0, 2.0, True),
        (">=", 2, None, None),
    ],
)
def test_target_is_judged(sign: str, bound: float, value: float | None, met: bool | None) -> None:
    assert Claim.judge("x", sign, bound, value).met is met


def test_rows_go_round(tmp_path: Path) -> None:
    rows = measure(
        "nothing",
        [Subject("none", lambda: None)],
        Setting(size_of("tiny"), torch.float32, CPU, 1, "none"),
        baseline="none",
        shapes={},
        layers=0,
    )
    file = tmp_path / "bench.jsonl"
    for _ in range(2):
        assert list(keep(tmp_path, rows)) == rows
    assert read_rows(file) == rows * 2
    file.write_text('{"what": 1}\n')
    with pytest.raises(ConfigError, match=r"bench.jsonl:1"):
        read_rows(file)


def test_rows_are_kept_as_they_are_measured(tmp_path: Path) -> None:
    file, targets = tmp_path / "bench.jsonl", tmp_path / "targets.jsonl"

    def measured() -> Iterator[BenchRow | Claim]:
        yield ROW
        assert read_rows(file) == [ROW]  # before the next one is measured
        yield Claim.judge("x", "<=", 1.0, 0.5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(keep(tmp_path, measured()))
    assert read_rows(file) == [ROW] and not targets.exists()


def test_targets_replace_those_of_the_same_name(tmp_path: Path) -> None:
    for value, names in ((0.5, "xy"), (2.0, "yz")):
        list(keep(tmp_path, [Claim.judge(name, "<=", 1.0, value) for name in names]))
    lines = (tmp_path / "targets.jsonl").read_text().splitlines()
    found = [Claim(**json.loads(line)) for line in lines]
    assert [(t.name, t.met) for t in found] == [("x", True), ("y", False), ("z", False)]


def _unmeasured() -> Iterator[BenchRow | Claim]:
    pytest.fail("measured before the folder was looked at")
    yield


def _target(name: str, value: float | None) -> Claim:
    return Claim.judge(name, "<=", 1.0, value)


def _targets(folder: Path) -> dict[str, float | None]:
    lines = (folder / "targets.jsonl").read_text().splitlines()
    return {target.name: target.value for target in (Claim(**json.loads(line)) for line in lines)}


@pytest.mark.parametrize("place", ["file", "file/below", "rows", "targets"])
def test_place_that_cannot_be_written_is_refused_before_measuring(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "rows" / "bench.jsonl").mkdir(parents=True)
    (tmp_path / "targets" / "targets.jsonl").mkdir(parents=True)
    out = tmp_path / place
    with pytest.raises(ConfigError, match=f"out='{out}'.*choose another folder"):
        next(keep(out, _unmeasured()))
    monkeypatch.setitem(COMPARISONS, "prefill", lambda setting: list(_unmeasured()))
    found = CliRunner().invoke(app, ["bench", "prefill", "--out", str(out)])
    assert isinstance(found.exception, ConfigError)


@pytest.mark.parametrize("name", ["bench.jsonl", "targets.jsonl"])
@pytest.mark.parametrize("damage", [b'{"what": 1}', b"{", b"\n", b"[]", b'"\xff"', b"nonsense"])
def test_damaged_file_is_refused_before_measuring(name: str, damage: bytes, tmp_path: Path) -> None:
    whole = LINE if name == "bench.jsonl" else b"%s\n" % _target("x", 1.0).to_json().encode()
    content = whole + damage + b"\n" + whole
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}:2: .*mend or delete the line"):
        next(keep(tmp_path, _unmeasured()))
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize(
    "size", [1, 5, 9, 30, LINE.index(b"\xc3") + 1, len(LINE) - 2, len(LINE) - 1]
)
def test_row_that_was_cut_in_two_takes_no_other_with_it(size: int, tmp_path: Path) -> None:
    file = tmp_path / "bench.jsonl"
    is_whole = size == len(LINE) - 1  # only the line break was lost
    file.write_bytes(LINE + LINE[:size])
    check_folder(tmp_path)
    assert file.read_bytes() == LINE * (1 + is_whole)

    def measured() -> Iterator[BenchRow]:
        file.write_bytes(LINE + LINE[:size])  # by another process, in the meantime
        yield ROW

    list(keep(tmp_path, measured()))
    assert file.read_bytes() == LINE * (2 + is_whole)


def test_last_line_that_is_no_part_of_a_row_stays(tmp_path: Path) -> None:
    (tmp_path / "bench.jsonl").write_bytes(LINE + b"my notes")
    with pytest.raises(ConfigError, match=r"bench\.jsonl:2"):
        check_folder(tmp_path)
    assert (tmp_path / "bench.jsonl").read_bytes().rstrip() == LINE + b"my notes"


def test_targets_are_replaced_whole(tmp_path: Path) -> None:
    list(keep(tmp_path, [_target("x", 0.5)]))
    os.link(tmp_path / "targets.jsonl", tmp_path / "before")
    before = (tmp_path / "before").read_text()
    list(keep(tmp_path, [_target("x", 0.75)]))
    assert (tmp_path / "before").read_text() == before
    assert _targets(tmp_path) == {"x": 0.75}
    assert sorted(os.listdir(tmp_path)) == [".bench.lock", "before", "bench.jsonl", "targets.jsonl"]


def test_targets_of_two_at_once_are_all_kept(tmp_path: Path) -> None:
    is_held = threading.Event()

    def other() -> None:
        with FileLock(tmp_path / LOCK):
            is_held.set()
            time.sleep(0.3)  # has read nothing yet, and takes its time to write
            (tmp_path / "targets.jsonl").write_text(f"{_target('y', 2.0).to_json()}\n")

    def measured() -> Iterator[Claim]:
        yield _target("x", 0.5)
        thread.append(threading.Thread(target=other))
        thread[0].start()
        assert is_held.wait(60)

    thread: list[threading.Thread] = []
    list(keep(tmp_path, measured()))
    thread[0].join()
    assert _targets(tmp_path) == {"y": 2.0, "x": 0.5}


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [(0.5, None, 0.5), (0.5, 0.75, 0.75), (None, 0.75, 0.75), (0.0, None, 0.0), (None, None, None)],
)
@pytest.mark.parametrize("runs", [1, 2])
def test_target_without_a_value_replaces_none_that_has_one(
    before: float | None, after: float | None, kept: float | None, runs: int, tmp_path: Path
) -> None:
    pair = [_target("x", before), _target("x", after)]
    for rows in [pair] if runs == 1 else [[target] for target in pair]:
        list(keep(tmp_path, rows))
    assert _targets(tmp_path) == {"x": kept}


@pytest.mark.parametrize(
    ("seconds", "repeats"), [(1.0, 1), (5e-3, 1), (2e-3, 3), (1e-6, 200), (0.0, 200)]
)
def test_short_runs_are_repeated(seconds: float, repeats: int) -> None:
    assert repeats_for(seconds) == repeats


@pytest.mark.parametrize("what", [name for name in COMPARISONS if name not in ELSEWHERE])
def test_bench_command_prints_rows(what: str) -> None:
    found = CliRunner().invoke(
        app, ["bench", what, "--size", "tiny", "--precision", "fp32", "--rounds", "1", "--json"]
    )
    assert found.exit_code == 0, found.output
    rows = [BenchRow(**json.loads(line)) for line in found.output.splitlines() if line[:1] == "{"]
    assert all(row.what.startswith(what) and row.p50 > 0 for row in rows)
    assert all((row.ratio or 0) > 0 or row.baseline is None for row in rows)
    assert len({(row.what, row.subject) for row in rows}) == len(rows) >= 2


def test_bench_targets_are_all_judged(tmp_path: Path) -> None:
    found = list(bench("targets", size="tiny", precision="bf16", rounds=1))
    targets = [row for row in found if isinstance(row, Claim)]
    assert len(targets) == len({target.name for target in targets}) == 26
    assert [t.name for t in targets if t.value is None] == [t.name for t in targets[-5:]]
    assert {t.device for t in targets} == {device_name(CPU)}
    assert all((t.met is None) == (t.value is None) for t in targets)
    for _ in range(2):
        list(keep(tmp_path, found))
    assert len(read_rows(tmp_path / "bench.jsonl")) == 2 * (len(found) - 26)
    assert len((tmp_path / "targets.jsonl").read_text().splitlines()) == 26


def test_bench_targets_in_fp32_are_those_of_fp32() -> None:
    found = list(bench("targets", size="tiny", precision="fp32", rounds=1))
    *targets, rest = [row for row in found if isinstance(row, Claim)]
    assert {row.dtype for row in found if isinstance(row, BenchRow)} == {"float32"}
    assert targets and all(t.name.endswith("float32") and t.met is not None for t in targets)
    assert rest.value is None and "--precision bf16" in rest.note


@pytest.mark.parametrize(("cost", "dtype"), [(0.3, torch.bfloat16), (40.0, torch.float32)])
def test_bench_takes_what_the_machine_multiplies_faster(
    monkeypatch: pytest.MonkeyPatch, cost: float, dtype: torch.dtype
) -> None:
    settings: list[Setting] = []
    monkeypatch.setattr(compute, "bf16_cost", lambda device_type: cost)
    monkeypatch.setitem(COMPARISONS, "prefill", lambda setting: settings.append(setting) or [])
    list(bench("prefill", size="tiny"))
    assert settings[0].dtype == dtype
    assert f"--precision {'bf16' if cost < 1 else 'fp32'}" in settings[0].command
    with pytest.raises(ConfigError, match="precision='int8'"):
        bench("prefill", precision="int8")


def test_targets_of_another_device_stay(tmp_path: Path) -> None:
    for device, value in (("laptop", 0.5), ("server", 2.0), ("laptop", 0.75)):
        list(keep(tmp_path, [Claim.judge("x", "<=", 1.0, value, "", device)]))
    lines = (tmp_path / "targets.jsonl").read_text().splitlines()
    found = [Claim(**json.loads(line)) for line in lines]
    assert [(t.device, t.value) for t in found] == [("laptop", 0.75), ("server", 2.0)]


def test_device_names_the_instructions_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    flags = ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]
    assert instructions(flags) == "AVX512_BF16, AMX_BF16"
    assert instructions(["avx2"]) == torch.backends.cpu.get_cpu_capability()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert instructions(flags) == "limited to AVX2"
    assert "(limited to AVX2), " in device_name(CPU)


def test_peak_bytes_sees_what_a_run_allocates() -> None:
    least = peak_bytes(lambda: None, CPU)
    most = peak_bytes(lambda: torch.ones(64, 2**20).sum(), CPU)
    assert least is not None and most is not None
    assert most - least == pytest.approx(64 * 2**20 * 4, rel=0.1)


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:1", 1), ("auto", 0)])
def test_bench_takes_a_device_with_and_without_a_number(
    name: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    settings: list[Setting] = []
    monkeypatch.setitem(COMPARISONS, "prefill", lambda setting: settings.append(setting) or [])
    list(bench("prefill", size="tiny", precision="bf16", device=name))
    assert chosen == [index]
    assert settings[0].device == torch.device("cuda", index)
    assert settings[0].command.endswith(f"--device {name}")


def test_bench_unknown_name_is_refused() -> None:
    found = CliRunner().invoke(app, ["bench", "nonsense"])
    assert isinstance(found.exception, ConfigError)
    assert "prefill" in str(found.exception)
