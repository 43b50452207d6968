"""Training from tar shards with packing: one process and two, killed and resumed, records bad."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import tiny_shards
import torch
from interrupted import interrupt
from safetensors.torch import load_file

from mono_internvl.data.encoder import RecordEncoder
from mono_internvl.data.prepare import prepare
from mono_internvl.distributed import run_processes
from mono_internvl.errors import RecipeError, SampleError, TrainingStateError
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.training.loop import train_stage


@pytest.fixture(scope="module")
def shards(start: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small sources as indexed shards."""
    out = tmp_path_factory.mktemp("shards")
    encode = RecordEncoder(MonoInternVLProcessor.from_pretrained(start), 1)
    prepare(data / "mixed.json", out, encode, shard_records=5)
    return out


def _stage(**fields: Any) -> Any:
    common: dict[str, Any] = {
        "data": "meta.json",
        "packing": "best_fit",
        "packed_tokens": 128,
        "steps": 4,
        "batch_size": 6,
        "checkpoint_every": 1,
    }
    return tiny_runs.tiny_stage(**{**common, **fields})


def test_packed_run_resumes_to_the_same_bits_with_any_readers(
    monkeypatch: pytest.MonkeyPatch, start: Path, shards: Path, tmp_path: Path
) -> None:
    whole = train_stage(_stage(), start, shards, tmp_path / "whole")
    interrupt(monkeypatch, 3, _stage(), start, shards, tmp_path / "cut")
    cut = train_stage(_stage(loader_workers=2), start, shards, tmp_path / "cut")
    assert cut.resumed_at == 2
    rows = [tiny_runs.metric_rows(one.metrics) for one in (whole, cut)]
    assert rows[0] == rows[1]
    assert all(row["rows"] >= 2 and row["tokens"] <= 128 * row["rows"] for row in rows[0])
    weights = [load_file(one.checkpoint / "model.safetensors") for one in (whole, cut)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    with pytest.raises(TrainingStateError, match="packing='best_fit', this stage has 'none'"):
        train_stage(_stage(packing="none"), start, shards, tmp_path / "cut")


def test_packed_loss_is_that_of_padded_batches(start: Path, shards: Path, tmp_path: Path) -> None:
    one_epoch = {"steps": 1, "batch_size": 28}
    packed = train_stage(_stage(**one_epoch), start, shards, tmp_path / "packed")
    padded = train_stage(_stage(**one_epoch, packing="none"), start, shards, tmp_path / "padded")
    (first,), (other,) = (tiny_runs.metric_rows(one.metrics) for one in (packed, padded))
    assert first["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert first["tokens"] == other["tokens"] and first["images"] == other["images"]


def _train(stage: Any, start: Path, data: Path, run: Path) -> None:
    train_stage(stage, start, data, run)


def test_two_processes_take_the_steps_of_one(start: Path, shards: Path, tmp_path: Path) -> None:
    run_processes(_train, 2, _stage(), start, shards, tmp_path / "two")
    alone = train_stage(_stage(), start, shards, tmp_path / "one")
    rows = [tiny_runs.metric_rows(tmp_path / n / "metrics.jsonl") for n in ("one", "two")]
    assert alone.steps == len(rows[1]) == 4
    for one, two in zip(*rows, strict=True):
        assert {n: one[n] for n in ("tokens", "images", "rows")} == {
            n: two[n] for n in ("tokens", "images", "rows")
        }
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def broken_records(folder: Path) -> list[bytes]:
    """Lines that are bad in ten ways."""
    picture = tiny_shards.picture(0, kind="PNG")
    (folder / "torn.png").write_bytes(picture[: len(picture) // 2])
    bomb = bytearray(picture)
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(bomb)
    turns = tiny_shards.conversation(0)["conversations"]

    def line(**fields: Any) -> bytes:
        return json.dumps({"id": "bad", "conversations": turns, **fields}).encode()

    answer = {"from": "gpt", "value": "x"}
    return [
        line(image="torn.png"),
        line(image="bomb.png"),
        line(image="gone.png"),
        line(image=["torn.png", "torn.png"]),
        line(image="torn.png")[:-5] + b'\xff\xfe"}',
        b'{"id": "bad", "conv',
        line(conversations=[{"from": "human", "value": "say"}, {"from": "gpt", "value": ""}]),
        line(conversations=[{"from": "robot", "value": "say"}, answer]),
        line(conversations=[{"from": "human", "value": "one " * 300}, answer]),
        line(note="x" * (10 << 20)),
    ]


KINDS = {
    *("image damaged", "image too large", "image missing", "placeholders", "not UTF-8", "not JSON"),
    *("empty answer", "unknown role", "too long", "line too long"),
}


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_one_broken_record_in_a_hundred_is_counted_and_quarantined_and_training_ends(
    start: Path, tmp_path: Path, packing: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = [json.dumps(tiny_runs.text_record(n)).encode() for n in range(990)]
    bad = broken_records(tmp_path)
    lines = [line for n in range(10) for line in (*good[n * 99 : n * 99 + 99], bad[n])]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    entry = {"mine": {"root": ".", "annotation": "a.jsonl"}}
    tiny_shards.write_meta(tmp_path / "meta.json", entry)
    fields = {"packing": packing, "steps": 10, "batch_size": 100, "on_bad_sample": "skip"}
    # Batches hold records of like length, so without packing the bad ones come together.
    stage = _stage(**fields, max_skipped_ratio=0.05, checkpoint_every=0)
    done = train_stage(stage, start, tmp_path, tmp_path / "run")
    rows = tiny_runs.metric_rows(done.metrics)
    assert sum(row["skipped"] for row in rows) == 10
    listed = [json.loads(line) for line in (tmp_path / "run/quarantine.jsonl").open()]
    assert {row["reason"] for row in listed} == KINDS and len(listed) == 10
    assert {int(row["message"].split(":")[1]) for row in listed} == {
        n * 100 + 100 for n in range(10)
    }
    assert {row["source"] for row in listed} == {"mine"}
    assert all(row["message"].startswith(f"{tmp_path / 'a.jsonl'}:") for row in listed)
    strict = _stage(**fields, max_skipped_ratio=0.005, checkpoint_every=0)
    with pytest.raises(
        SampleError, match=r"records were skipped, more than max_skipped_ratio=0\.005"
    ):
        train_stage(strict, start, tmp_path, tmp_path / "strict")
    table = next(r.getMessage() for r in caplog.records if "all listed in" in r.getMessage())
    assert str(tmp_path / "strict/quarantine.jsonl") in table and "1  mine" in table


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_two_processes_list_what_either_left_out(start: Path, tmp_path: Path, packing: str) -> None:
    lines = [json.dumps(tiny_runs.text_record(n)).encode() for n in range(30)] + broken_records(
        tmp_path
    )
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    entry = {"mine": {"root": ".", "annotation": "a.jsonl"}}
    tiny_shards.write_meta(tmp_path / "meta.json", entry)
    fields = {"packing": packing, "steps": 2, "batch_size": 20, "on_bad_sample": "skip"}
    stage = _stage(**fields, max_skipped_ratio=0.5, checkpoint_every=0)
    run_processes(_train, 2, stage, start, tmp_path, tmp_path / "run")
    listed = [json.loads(line) for line in (tmp_path / "run/quarantine.jsonl").open()]
    assert {row["reason"] for row in listed} == KINDS and len(listed) == 10
    rows = tiny_runs.metric_rows(tmp_path / "run/metrics.jsonl")
    assert sum(row["skipped"] for row in rows) == 10


def test_resumed_run_lists_no_record_twice(
    monkeypatch: pytest.MonkeyPatch, start: Path, tmp_path: Path
) -> None:
    lines = [json.dumps(tiny_runs.text_record(n)) for n in range(12)]
    lines[3] = lines[7] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    entry = {"mine": {"root": ".", "annotation": "a.jsonl"}}
    tiny_shards.write_meta(tmp_path / "meta.json", entry)
    fields = {"steps": 4, "batch_size": 6, "on_bad_sample": "skip", "checkpoint_every": 2}
    stage = _stage(**fields, max_skipped_ratio=1.0)
    whole = train_stage(stage, start, tmp_path, tmp_path / "whole")
    interrupt(monkeypatch, 3, stage, start, tmp_path, tmp_path / "cut")
    train_stage(stage, start, tmp_path, tmp_path / "cut")
    listed = [(tmp_path / name / "quarantine.jsonl").read_text() for name in ("whole", "cut")]
    assert listed[0] == listed[1] and len(listed[0].splitlines()) == 4
    assert sum(row["skipped"] for row in tiny_runs.metric_rows(whole.metrics)) == 4


def test_packing_that_cannot_be_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"packed_tokens=64 cannot hold .* max_tokens=128"):
        _stage(packed_tokens=64)
    with pytest.raises(RecipeError, match="accumulation=2 with packing"):
        _stage(accumulation=2)


def test_data_is_augmented_alike_whenever_a_step_is_taken(
    start: Path, data: Path, tmp_path: Path
) -> None:
    entry = {"root": str(data), "annotation": str(data / "images.jsonl")}
    losses = []
    for name, augment in (("a", True), ("b", True), ("c", False)):
        tiny_shards.write_meta(
            tmp_path / "meta.json", {"images": {**entry, "data_augment": augment}}
        )
        done = train_stage(_stage(steps=1), start, tmp_path, tmp_path / name)
        losses.append(tiny_runs.metric_rows(done.metrics)[0]["loss"])
    assert losses[0] == losses[1] != losses[2]
