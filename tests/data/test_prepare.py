"""Sources of every kind as indexed shards: the same samples, their lengths known, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_runs
import tiny_shards
import torch

from mono_internvl.data.encoder import RecordEncoder
from mono_internvl.data.prepare import prepare
from mono_internvl.data.sources import MeasuredSource, TarSource, read_meta
from mono_internvl.data.sources.tar_index import index_file
from mono_internvl.errors import ConfigError, SampleError
from mono_internvl.processing.processor import MonoInternVLProcessor


@pytest.fixture(scope="module")
def encode(tmp_path_factory: pytest.TempPathFactory) -> RecordEncoder:
    folder = tiny_runs.write_checkpoint(tmp_path_factory.mktemp("tiny") / "start")
    return RecordEncoder(MonoInternVLProcessor.from_pretrained(folder), 4)


def _sources(folder: Path) -> Path:
    """One source of each kind, 23 records."""
    tiny_shards.write_tar(folder / "in/0.tar", tiny_shards.caption_members(range(4)))
    (folder / "in/images").mkdir()
    (folder / "in/images/0.png").write_bytes(tiny_shards.picture(0, 120, 60, "PNG"))
    lines = [{**tiny_shards.conversation(n), "image": "0.png"} for n in range(7)]
    tiny_runs.write_lines(folder / "in/c.jsonl", lines)
    (folder / "in/llava.json").write_text(json.dumps(lines[:3]))
    tiny_runs.write_lines(folder / "in/t.jsonl", [{"text": f"words {n}"} for n in range(5)])
    rows = [
        {"images": [{"bytes": tiny_shards.picture(n), "path": None}] * n, "texts": texts}
        for n, texts in enumerate([[{"user": "q?", "assistant": "a"}]] * 4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "in/p.parquet")
    entries = {
        "tars": {"annotation": "*.tar", "prompt": "say what", "repeat_time": 3},
        "lines": {"root": "images", "annotation": "c.jsonl", "max_dynamic_patch": 2},
        "llava": {"root": "images", "annotation": "llava.json", "data_augment": True},
        "text": {"root": ".", "annotation": "t.jsonl"},
        "rows/odd name": {"annotation": "p.parquet"},
    }
    return tiny_shards.write_meta(folder / "in/meta.json", entries)


def test_every_source_becomes_shards_of_the_same_samples(
    tmp_path: Path, encode: RecordEncoder
) -> None:
    meta = _sources(tmp_path)
    done = prepare(meta, tmp_path / "out", encode, shard_records=3)
    assert (done.counts.num_records, done.counts.num_skipped) == (23, 0)
    assert done.shards == 1 + 3 + 1 + 2 + 2
    old, new = read_meta(meta), read_meta(done.meta)
    assert [(s.name, s.repeat, len(s)) for s in old] == [(s.name, s.repeat, len(s)) for s in new]
    for one, other in zip(old, new, strict=True):
        assert isinstance(other, TarSource) and isinstance(other, MeasuredSource)
        for index in range(len(one)):
            first, second = one.record(index), other.record(index)
            assert second.max_tiles == first.max_tiles
            assert second.augmentation == first.augmentation
            samples = [encode(record) for record in (first, second)]
            assert torch.equal(samples[0].input_ids, samples[1].input_ids)
            assert torch.equal(samples[0].labels, samples[1].labels)
            pixels = [sample.pixel_values for sample in samples]
            assert (pixels[0] is None) == (pixels[1] is None)
            assert pixels[0] is None or torch.equal(*pixels)
            measure = other.measure(index, encode.tokenized_by)
            assert measure is not None
            assert encode.length(measure) == len(samples[0].input_ids)
            assert other.measure(index, "another tokenizer") is None


def test_second_call_goes_on_and_other_settings_are_refused(
    tmp_path: Path, encode: RecordEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, out = _sources(tmp_path), tmp_path / "out"
    prepare(meta, out, encode, shard_records=3)
    whole = {file.name: file.read_bytes() for file in out.glob("*.tar")}
    index_file(out / "lines-000001.tar").unlink()  # as a kill may leave it: the shard never was
    (out / "lines-000001.tar").unlink()
    (out / ".lines-000001.tar.partial").write_bytes(b"half a shard")
    measured: list[str] = []
    count = MonoInternVLProcessor.count_text_tokens

    def counted(self: Any, turns: Any) -> int:
        measured.append("one")
        return count(self, turns)

    monkeypatch.setattr(MonoInternVLProcessor, "count_text_tokens", counted)
    prepare(meta, out, encode, shard_records=3)
    assert len(measured) == 3, "only the shard that was missing"
    assert {file.name: file.read_bytes() for file in out.glob("*.tar")} == whole
    assert not list(out.glob(".*.partial"))
    with pytest.raises(ConfigError, match="begun with shard_records=3, expected 4"):
        prepare(meta, out, encode, shard_records=4)


def test_bad_records_are_listed_and_too_many_stop(tmp_path: Path, encode: RecordEncoder) -> None:
    lines: list[Any] = [tiny_runs.text_record(n) for n in range(30)]
    lines[4] = {"id": 4, "image": "gone.png", **tiny_shards.conversation(0)}
    lines[9] = {"conversations": []}
    tiny_runs.write_lines(tmp_path / "a.jsonl", lines)
    entry = {"mine": {"root": ".", "annotation": "a.jsonl"}}
    meta = tiny_shards.write_meta(tmp_path / "m.json", entry)
    done = prepare(meta, tmp_path / "out", encode, shard_records=10)
    listed = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").open()]
    assert [row["reason"] for row in listed] == ["image missing", "malformed"]
    assert listed[1]["message"].startswith(f"{tmp_path / 'a.jsonl'}:10: ")
    assert done.counts.num_skipped == 2 and len(read_meta(done.meta)[0]) == 28
    prepare(meta, tmp_path / "out", encode, shard_records=10)
    assert [json.loads(x) for x in (tmp_path / "out/quarantine.jsonl").open()] == listed
    with pytest.raises(SampleError, match="2 of 30 records were skipped"):
        prepare(meta, tmp_path / "strict", encode, shard_records=30, max_skipped_ratio=0.01)
