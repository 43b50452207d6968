"""Parquet files and saved datasets with image bytes, in the columns that public ones have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_shards

from mono_internvl.data.sources import DatasetSource, ParquetSource, read_meta
from mono_internvl.errors import SampleError
from mono_internvl.processing.image_files import load_image


def _image(number: int) -> dict[str, Any]:
    return {"bytes": tiny_shards.picture(number), "path": None}


def fine_vision(count: int) -> list[dict[str, Any]]:
    """Rows in FineVision's columns."""
    return [
        {
            "images": [_image(i) for i in range(number % 3)],
            "texts": [{"user": f"q{number}?", "assistant": "a"}, {"user": "b?", "assistant": "c"}],
            "source": "toy",
            "relevance_min": 3,
        }
        for number in range(count)
    ]


def one_vision(count: int) -> list[dict[str, Any]]:
    """Rows in LLaVA-OneVision's columns."""
    return [
        {
            "id": f"row{n}",
            "image": _image(n),
            "conversations": tiny_shards.conversation(n)["conversations"],
            "data_source": "toy",
        }
        for n in range(count)
    ]


def test_parquet_in_the_columns_of_public_sets(tmp_path: Path) -> None:
    for number, rows in enumerate((fine_vision(7), one_vision(5))):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{number}.parquet", row_group_size=2)
    meta = tiny_shards.write_meta(
        tmp_path / "m.json", {"both": {"annotation": "*.parquet", "repeat_time": 2}}
    )
    (source,) = read_meta(meta)
    assert (len(source), source.repeat) == (12, 2.0)
    shown = [len(source.record(i).images) for i in range(12)]
    assert shown == [0, 1, 2, 0, 1, 2, 0, 1, 1, 1, 1, 1]
    two = source.record(5)
    assert [turn.text for turn in two.turns] == ["\n\nq5?", "a", "b?", "c"]
    assert two.fields["source"] == "toy" and two.where == f"{tmp_path / '0.parquet'}:5"
    last = source.record(11)
    assert last.record_id == "row4" and last.where == f"{tmp_path / '1.parquet'}:4"
    assert load_image(last.images[0]).size == (56, 56)


def test_parquet_rows_change_the_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    prints = []
    for rows in (one_vision(3), one_vision(3), one_vision(4)):
        pq.write_table(pa.Table.from_pylist(rows), file)
        prints.append(ParquetSource(file, tmp_path).fingerprint())
    assert prints[0] == prints[1] != prints[2]


def test_saved_dataset_is_read_with_encoded_images(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
        }
    )
    rows = {"image": [_image(n) for n in range(4)], "caption": ["red", "green", "blue", "red"]}
    found = datasets.Dataset.from_dict(rows, features=features)
    found.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": found}).save_to_disk(tmp_path / "splits")
    meta = tiny_shards.write_meta(tmp_path / "m.json", {"mine": {"annotation": "saved"}})
    (source,) = read_meta(meta)
    assert isinstance(source, DatasetSource) and len(source) == 4
    record = source.record(2)
    assert record.turns[-1].text == "blue" and record.where.endswith("saved[2]")
    assert record.images[0].read() == tiny_shards.picture(2)
    with pytest.raises(SampleError, match="holds the splits train"):
        DatasetSource(tmp_path / "splits", tmp_path)


def test_image_that_a_row_names_is_a_file_under_root(tmp_path: Path) -> None:
    (tmp_path / "i.jpg").write_bytes(tiny_shards.picture(0))
    rows = [{"image": {"bytes": None, "path": name}, "text": "a"} for name in ("i.jpg", "gone.jpg")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = ParquetSource(tmp_path / "a.parquet", tmp_path)
    assert source.record(0).images[0].read() == tiny_shards.picture(0)
    with pytest.raises(SampleError, match=r"a\.parquet:1: image .*gone\.jpg") as raised:
        source.record(1)
    assert raised.value.reason == "image missing"


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(one_vision(40)), file, row_group_size=10)
    source = ParquetSource(file, tmp_path)
    content = bytearray(file.read_bytes())
    content[200:20_000] = b"\xff" * 19_800
    file.write_bytes(content)
    with pytest.raises(SampleError, match=r"a\.parquet:0: row group 0 is not readable") as raised:
        source.record(0)
    assert raised.value.reason == "shard damaged"
    file.write_bytes(b"PAR1")
    with pytest.raises(SampleError, match=r"a\.parquet: not a readable parquet file"):
        ParquetSource(file, tmp_path)
    with pytest.raises(SampleError, match=r"gone\.parquet: no such parquet file"):
        ParquetSource(tmp_path / "gone.parquet", tmp_path)


def test_row_without_words_or_image_bytes_is_bad(tmp_path: Path) -> None:
    rows = [{"image": _image(0), "other": "x"}, {"image": {"bytes": None, "path": None}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = ParquetSource(tmp_path / "a.parquet", tmp_path)
    for index, reason in enumerate(("no words", "image missing")):
        with pytest.raises(SampleError) as raised:
            source.record(index)
        assert raised.value.reason == reason


def test_documents_in_jsonl_are_learnt_whole(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "some words"}) + "\n" + json.dumps({"text": " "}) + "\n"
    )
    entry = {"root": ".", "annotation": "a.jsonl"}
    (source,) = read_meta(tiny_shards.write_meta(tmp_path / "m.json", {"text": entry}))
    assert source.record(0).document == "some words"
    with pytest.raises(SampleError, match=r"a\.jsonl:2: text is empty"):
        source.record(1)
