"""The world in tar shards, by the command line: prepared, shown, checked, trained on packed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

from mono_internvl.cli import app as cli
from mono_internvl.miniature import WorldFiles

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `mono-internvl ...` in this process: exit code, standard output, standard error."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mono-internvl", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_checkpoint(tmp_path_factory.mktemp("tiny") / "start")


@pytest.fixture(scope="module")
def part(world: WorldFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A meta file of the first 40 records of each source of S2, and one broken line."""
    folder = tmp_path_factory.mktemp("part")
    entries = json.loads(world.s2.read_text())
    for name, entry in entries.items():
        lines = (world.root / entry["annotation"]).read_text().splitlines()[:40]
        (folder / f"{name}.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
        entry |= {"annotation": f"{name}.jsonl", "root": str(world.root / entry["root"])}
    (folder / "meta.json").write_text(json.dumps(entries))
    return folder / "meta.json"


def test_world_is_prepared_shown_checked_and_trained_on_packed(
    command: Command, part: Path, model: Path, tmp_path: Path
) -> None:
    out, num_sources = tmp_path / "shards", len(json.loads(part.read_text()))
    code, said, _ = command(
        "data", "prepare", part, "--model", model, "--out", out, "--shard-records", 16
    )
    assert code == 0
    assert f"records: {41 * num_sources} in {3 * num_sources} shards" in said
    assert "not JSON" in said and f"meta:    {out / 'meta.json'}" in said
    assert len((out / "quarantine.jsonl").read_text().splitlines()) == num_sources

    limits = ("--max-tokens", 512, "--max-tiles", 1)
    options = ("--model", model, *limits, "--json")
    code, said, _ = command("data", "verify", out / "meta.json", *options)
    found = json.loads(said)
    assert code == 0 and sum(counts["records"] for counts in found.values()) == 40 * num_sources

    listed = tmp_path / "bad.jsonl"
    arguments = ("--model", model, *limits, "--out", listed)
    code, said, complaints = command("data", "verify", part, *arguments)
    assert code == 1 and said.count("1  not JSON") == num_sources
    assert complaints.count("bad: ") == num_sources == len(listed.read_text().splitlines())

    sheet = tmp_path / "sheet.html"
    code, said, _ = command(
        *("data", "inspect", part, "--model", model, "--out", sheet, *limits),
        *("--records", 30, "--samples", 5),
    )
    page = sheet.read_text()
    assert code == 0 and "tokens" in said
    assert page.count('class="sheet"') == 5 and 'class="learnt"' in page
    assert "&lt;|im_end|&gt;" in page and "<script" not in page

    rows = {}
    for processes in (1, 2):
        run = tmp_path / f"run{processes}"
        settings = {
            "packing": "best_fit",
            "packed_tokens": 512,
            "steps": 2,
            "batch_size": 12,
            "warmup_ratio": 0,
            "precision": "fp32",
            "on_bad_sample": "skip",
        }
        chosen = [x for name, value in settings.items() for x in ("--set", f"{name}={value}")]
        code, _, complaints = command(
            *("train", "miniature-sft", "--model", model, "--data", out / "meta.json"),
            *("--out", run, "--processes", processes, "--threads", 1, *chosen),
        )
        assert code == 0, complaints
        rows[processes] = tiny_runs.metric_rows(run / "sft" / "metrics.jsonl")
    for one, two in zip(rows[1], rows[2], strict=True):
        same = ("tokens", "images", "rows", "skipped")
        assert [one[name] for name in same] == [two[name] for name in same]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert one["skipped"] == 0 and one["rows"] > 1


def test_mistakes_at_the_door_are_one_line(command: Command, model: Path, tmp_path: Path) -> None:
    for verb in ("prepare", "verify", "inspect"):
        out = ("--out", tmp_path / "out")
        code, _, complaints = command("data", verb, tmp_path / "no.json", "--model", model, *out)
        assert code == 1 and "no such meta file" in complaints
        assert "Traceback" not in complaints
