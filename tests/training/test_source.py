"""A second kind of source, records and pictures in memory, trains through the real loop."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file

from mono_internvl.data.records import Record, parse_record
from mono_internvl.data.sources import SOURCES
from mono_internvl.errors import SampleError, TrainingStateError
from mono_internvl.training.loop import train_stage
from mono_internvl.training.progress import StageProgress


@dataclass(frozen=True)
class MemoryImage:
    """An encoded picture in memory."""

    data: bytes

    def read(self, size: int = -1, /) -> bytes:
        return self.data if size < 0 else self.data[:size]

    def version(self) -> tuple[int, ...]:
        return len(self.data), zlib.crc32(self.data)


class MemorySource:
    """Raw records in a list, their pictures in a dictionary; no file is read."""

    def __init__(
        self,
        records: list[dict[str, Any]],
        pictures: dict[str, bytes],
        *,
        name: str,
        repeat: float,
        max_tiles: int | None,
    ):
        self.records, self.pictures = records, pictures
        self.name, self.repeat, self.max_tiles = name, repeat, max_tiles

    def __len__(self) -> int:
        return len(self.records)

    def record(self, index: int) -> Record:
        where = f"{self.name}[{index}]"

        def open_image(name: str) -> MemoryImage:
            if name not in self.pictures:
                raise SampleError(f"{where}: no picture {name!r}", reason="image missing")
            return MemoryImage(self.pictures[name])

        return parse_record(self.records[index], index, where, open_image, self.max_tiles)

    def size(self, index: int) -> int:
        return len(json.dumps(self.records[index]))

    def fingerprint(self) -> bytes:
        return json.dumps(self.records).encode()


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """The records of `images.jsonl`, which `memory.json` names as a source in memory."""
    found = [json.loads(line) for line in (data / "images.jsonl").read_text().splitlines()]
    pictures = {record["image"]: (data / record["image"]).read_bytes() for record in found}
    monkeypatch.setitem(
        SOURCES, ".memory", lambda path, root, **options: MemorySource(found, pictures, **options)
    )
    entry = {"root": "nowhere", "annotation": "a.memory"}
    (tmp_path / "memory.json").write_text(json.dumps({"images": entry}))
    return found


def test_source_in_memory_trains_and_resumes_to_the_numbers_of_files(
    monkeypatch: pytest.MonkeyPatch,
    records: list[dict[str, Any]],
    start: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    class Stopped(Exception):
        pass

    def update(self: StageProgress, row: dict[str, Any]) -> None:
        if row["step"] == 2:
            raise Stopped

    def stage(meta: str) -> Any:
        return tiny_runs.tiny_stage(steps=2, batch_size=4, checkpoint_every=1, data=meta)

    of_files = train_stage(stage("images.json"), start, data, tmp_path / "files")
    run = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(StageProgress, "update", update)
        train_stage(stage("memory.json"), start, tmp_path, run)
    records[0]["id"] = "another"
    with pytest.raises(TrainingStateError, match="begun with another data content"):
        train_stage(stage("memory.json"), start, tmp_path, run)
    records[0]["id"] = "image-0"
    in_memory = train_stage(stage("memory.json"), start, tmp_path, run)
    assert in_memory.resumed_at == 1
    rows = [tiny_runs.metric_rows(one.metrics) for one in (of_files, in_memory)]
    assert rows[0] == rows[1] and sum(row["images"] for row in rows[0]) == 8
    weights = [load_file(one.checkpoint / "model.safetensors") for one in (of_files, in_memory)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
