"""`evaluate --data` of every kind of store, with values that JSON has not."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_runs
import tiny_shards

from mono_internvl.errors import SampleError
from mono_internvl.evaluation.evaluate import evaluate
from mono_internvl.evaluation.questions import read_records
from mono_internvl.runs.json_lines import to_line
from mono_internvl.runs.predictions import read_predictions


def _stored(folder: Path) -> dict[str, Path]:
    """The same question in every kind of store, with fields that JSON has not."""
    image, asked = tiny_shards.picture(0), tiny_shards.conversation(0)
    extra = {"kind": "exact", "answer": "red"}
    (folder / "0.jpg").write_bytes(image)
    record = {**asked, **extra, "image": "0.jpg"}
    tiny_runs.write_lines(folder / "lines.jsonl", [record])
    (folder / "array.json").write_text(json.dumps([record]))
    words = json.dumps({**asked, **extra}).encode()
    tiny_shards.write_tar(folder / "tars/0.tar", [("0.jpg", image), ("0.json", words)])
    row = {**asked, **extra, "image": {"bytes": image, "path": None}}
    row |= {"when": datetime.date(2026, 1, 31), "weight": math.nan, "sound": b"123"}
    row |= {"price": decimal.Decimal("1.5"), "sizes": [{"width": 3}]}
    table = pa.Table.from_pylist([row])
    pq.write_table(table, folder / "rows.parquet")
    datasets.Dataset(table).save_to_disk(str(folder / "saved"))
    names = ("lines.jsonl", "array.json", "tars/*.tar", "rows.parquet", "saved")
    return {name: folder / name for name in names}


def test_questions_come_from_every_source(tmp_path: Path) -> None:
    for name, file in _stored(tmp_path).items():
        (question,) = read_records(file)
        assert (question.kind, question.record["answer"], question.text) == (
            *("exact", "red"),
            "what colour is this?",
        ), name
        (image,) = question.sample.images
        assert image.read() == tiny_shards.picture(0)
        again = json.loads(to_line(question.record))
        assert again == question.record and question.draws(2)[1].seed(), name
        if name in ("rows.parquet", "saved"):
            assert again["when"] == "2026-01-31" and again["sound"] == "3 bytes"
            assert (again["weight"], again["price"], again["sizes"]) == (
                None,
                "1.5",
                [{"width": 3}],
            )


def test_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.parquet", "*.tar", "a.tar"):
        with pytest.raises(SampleError, match=re.escape(name)):
            list(read_records(tmp_path / name))


def test_shards_are_asked_and_their_answers_kept(tmp_path: Path) -> None:
    start = tiny_runs.write_checkpoint(tmp_path / "start")
    shards = _stored(tmp_path)["tars/*.tar"]
    found = evaluate(start, shards, device="cpu", threads=1)
    assert found.items == {"exact": 1} and found.predictions.name == "predictions-_.jsonl"
    (kept,) = read_predictions(found.predictions)
    assert kept.record["id"] == "c0"
