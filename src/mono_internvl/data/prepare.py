"""Any sources as indexed tar shards: `mono-internvl data prepare`.

Shards that are there are indexed where they are; everything else is written into new ones. A shard
is there whole, with its index, or not at all, so that a second call goes on where the first one was
stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from mono_internvl.data.batches import Skipped, read_ahead
from mono_internvl.data.encoder import RecordEncoder, as_sample_error
from mono_internvl.data.records import Record, to_conversation
from mono_internvl.data.shard_files import add_member, image_extension
from mono_internvl.data.skipped import QUARANTINE_FILE, SkipCounts
from mono_internvl.data.sources import Measure, Source, TarSource, read_meta
from mono_internvl.data.sources.meta import read_entries
from mono_internvl.data.sources.tar_index import (
    IMAGE,
    TarIndex,
    index_file,
    read_head,
    scan,
    write_index,
)
from mono_internvl.errors import ConfigError, ImageError, PromptError, SampleError
from mono_internvl.processing.video import VideoFrame
from mono_internvl.runs.folder import begin, exclusive, resumable, write_whole
from mono_internvl.runs.json_lines import to_line

logger = logging.getLogger(__name__)

META_FILE, SETTINGS_FILE = "meta.json", "prepare.json"
_KEPT_FIELDS = ("repeat_time", "ratio", "max_dynamic_patch", "data_augment", "prompt")


@dataclass(frozen=True)
class Prepared:
    """What was made.

    Attributes:
        meta: Meta file that names the shards.
        shards: Their number.
        counts: Records, and those that were left out.
    """

    meta: Path
    shards: int
    counts: SkipCounts


def prepare(
    meta: Path,
    out: Path,
    encode: RecordEncoder,
    *,
    shard_records: int = 1000,
    workers: int = 0,
    max_skipped_ratio: float = 0.1,
) -> Prepared:
    """Turn the sources of a meta file into indexed tar shards.

    Args:
        meta: Names the sources.
        out: Folder for new shards, `meta.json`, and `quarantine.jsonl`, which lists bad records.
        encode: Counts the tokens of texts.
        shard_records: Records of a new shard.
        workers: Processes that work side by side; 0 works here.
        max_skipped_ratio: Of all records, how many may be bad.

    Raises:
        SampleError: A source cannot be opened, or too many of its records are bad.
        ConfigError: `out` was begun with other settings.
        TrainingStateError: Another process works there, or it cannot be written to.
    """
    if shard_records < 1:
        raise ConfigError(f"shard_records={shard_records}; expected a number >= 1")
    sources = read_meta(meta)
    with exclusive(out), resumable(out):
        sha = hashlib.sha256(meta.read_bytes())
        for source in sources:
            sha.update(source.fingerprint())
        settings = {
            "sources": sha.hexdigest()[:16],
            "tokenized_by": encode.tokenized_by,
            "shard_records": shard_records,
        }
        begin(out / SETTINGS_FILE, settings)
        tasks = list(_tasks(sources, out, shard_records))
        counts = SkipCounts(max_skipped_ratio)
        quarantined = out / QUARANTINE_FILE
        with quarantined.open("w", encoding="utf-8") as file:
            for done in read_ahead(_Work(tasks, encode), range(len(tasks)), workers):
                bad = [Skipped(*one) for one in done.bad]
                counts.note(bad)
                counts.add(done.records, len(bad))
                file.writelines(to_line(vars(record)) for record in bad)
                file.flush()
                counts.check(quarantined)
        entries = _entries(read_entries(meta), sources, meta.parent, out)
        write_whole(out / META_FILE, json.dumps(entries, indent=2))
    return Prepared(out / META_FILE, len(tasks), counts)


@dataclass(frozen=True)
class _Task:
    """A shard to index, or to write from records of a source."""

    source: Source
    shard: Path
    records: range | None


@dataclass(frozen=True)
class _Done:
    """A shard that is there: records that were looked at, and the bad ones among them."""

    records: int
    bad: tuple[tuple[str, str, str], ...]


class _Work(Dataset[_Done]):
    """The tasks as `read_ahead` takes them."""

    def __init__(self, tasks: Sequence[_Task], encode: RecordEncoder):
        self.tasks, self.encode = tasks, encode

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, number: int) -> _Done:
        task = self.tasks[number]
        try:
            if task.records is None:
                assert isinstance(task.source, TarSource)
                return _index_shard(task.source, task.shard, self.encode)
            return _write_shard(task.source, task.shard, task.records, self.encode)
        except OSError as error:
            raise ConfigError(
                f"{task.shard}: not written ({error}); make room on the disk, or give a folder "
                "that can be written to, and call again to go on"
            ) from error


def _tasks(sources: Sequence[Source], out: Path, shard_records: int) -> Iterator[_Task]:
    for source in sources:
        if isinstance(source, TarSource):
            for tar in dict.fromkeys(shard.tar for shard in source.shards):
                yield _Task(source, tar, None)
            continue
        for number, first in enumerate(range(0, len(source), shard_records)):
            records = range(first, min(first + shard_records, len(source)))
            yield _Task(source, out / f"{_file_name(source.name)}-{number:06d}.tar", records)


def _index_shard(source: TarSource, tar: Path, encode: RecordEncoder) -> _Done:
    key = source.counted_by(encode.tokenized_by)
    try:
        head = read_head(tar)
    except SampleError:  # of another file, or damaged: made anew
        head = None
        index_file(tar).unlink()
    if head is not None and head.tokenized_by == key:
        return _Done(head.records, head.bad)
    index = scan(tar)
    alone = TarSource.of_index(tar, index, source.options)
    measures: list[Measure | None] = []
    bad: list[tuple[str, str, str]] = []
    for sample in range(len(index)):
        try:
            measures.append(_measured(alone.record(sample), encode))
        except SampleError as error:
            measures.append(None)
            bad.append((source.name, error.reason, str(error)))
    write_index(tar, _with_sizes(index, measures, key), bad)
    return _Done(len(index), tuple(bad))


def _write_shard(source: Source, tar: Path, records: range, encode: RecordEncoder) -> _Done:
    if tar.is_file() and (head := read_head(tar)) is not None:
        return _Done(len(records), head.bad)
    measures: list[Measure | None] = []
    bad: list[tuple[str, str, str]] = []
    partial = tar.with_name(f".{tar.name}.partial")
    with tarfile.open(partial, "w") as file:
        for index in records:
            try:
                record = source.record(index)
                measure = _measured(record, encode)
                images = _contents(record)
            except SampleError as error:
                bad.append((source.name, error.reason, str(error)))
                continue
            measures.append(measure)
            words = json.dumps(to_conversation(record), ensure_ascii=False)
            add_member(file, f"{index:09d}.json", words.encode("utf-8", "surrogatepass"))
            for number, data in enumerate(images):
                extension = image_extension(data)
                add_member(file, f"{index:09d}.{number:03d}.{extension}", data)
    shard = scan(partial)
    key = TarSource.of_index(partial, shard, None).counted_by(encode.tokenized_by)
    # The index goes first: a shard without one would be taken for one that is not prepared.
    write_index(tar, _with_sizes(shard, measures, key), bad)
    partial.replace(tar)
    return _Done(len(records), tuple(bad))


def _measured(record: Record, encode: RecordEncoder) -> Measure:
    try:
        return encode.measure(record)
    except (ImageError, PromptError) as error:
        raise as_sample_error(error, record.where) from error


def _contents(record: Record) -> list[bytes]:
    if any(isinstance(image, VideoFrame) for image in record.images):
        raise SampleError(
            f"{record.where}: a video, which shards do not hold; keep it in a JSON lines source",
            reason="video in a store",
        )
    try:
        return [image.read() for image in record.images]
    except ImageError as error:
        raise as_sample_error(error, record.where) from error


def _with_sizes(index: TarIndex, measures: Sequence[Measure | None], key: str) -> TarIndex:
    """The index with the sizes of its images, which come in the order of their members."""
    sizes: list[tuple[int, int]] = []
    for sample, measure in enumerate(measures):
        images = iter(measure.image_sizes if measure is not None else ())
        for member in index.members(sample):
            is_image = index.kind[member] == IMAGE
            sizes.append(next(images, (0, 0)) if is_image else (0, 0))
    tokens = [-1 if measure is None else measure.text_tokens for measure in measures]
    return index.with_sizes(sizes, tokens, key)


def _entries(
    entries: Mapping[str, Any], sources: Sequence[Source], base: Path, out: Path
) -> dict[str, Any]:
    """The meta file of the shards: what the sources' own said of order and images is kept."""
    made = {}
    for (name, entry), source in zip(entries.items(), sources, strict=True):
        kept = {field: entry[field] for field in _KEPT_FIELDS if field in entry}
        if isinstance(source, TarSource):
            listed = entry["annotation"]
            names = listed if isinstance(listed, list) else [listed]
            kept["annotation"] = [os.path.relpath(base / one, out) for one in names]
        else:
            kept.pop("prompt", None)  # it is in the conversations
            kept["annotation"] = f"{_file_name(source.name)}-{'[0-9]' * 6}.tar"
        made[name] = kept
    return made


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name)
