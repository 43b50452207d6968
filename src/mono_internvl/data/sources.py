"""Where records come from, behind one protocol; today's: conversations in JSON and an image folder.

A meta file names the sources:

    {"captions": {"root": "images/", "annotation": "captions.jsonl", "repeat_time": 1}}

Paths in it are relative to the meta file. The suffix of an annotation says what reads it
(`SOURCES`): JSON lines, or one JSON array (`.json`) as LLaVA ships it.

Source: the dataset description of OpenGVLab/Mono-InternVL at 5b17ab4 and LLaVA's instruction files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mono_internvl.data.records import Record, parse_record, shortened
from mono_internvl.errors import SampleError
from mono_internvl.processing.image_files import read_file

_CHUNK_BYTES = 1 << 24
_LONGEST_BLANK = 32  # a line of so many bytes may be nothing but white space


class Source(Protocol):
    """Random access to records.

    Attributes:
        name: For messages and metrics.
        repeat: How often the source is seen per epoch.
    """

    name: str
    repeat: float

    def __len__(self) -> int:
        """Records."""
        ...

    def record(self, index: int) -> Record:
        """One record, its images unread.

        Raises:
            SampleError: It is malformed.
        """
        ...

    def size(self, index: int) -> int:
        """What is cheaply known of a record's length, in any unit: like ones share a batch."""
        ...

    def fingerprint(self) -> bytes:
        """What differs once a record has been changed; read when a run begins and resumes."""
        ...


@dataclass(frozen=True)
class FileImage:
    """An image file.

    Attributes:
        path: Of the file.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, size: int = -1, /) -> bytes:
        """The file; see `ImageRef`."""
        data = read_file(self.path)
        return data if size < 0 else data[:size]

    def version(self) -> tuple[int, ...]:
        """Size and time of change; see `ImageRef`."""
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns


class JsonlSource:
    """The lines of a JSONL file: only their offsets are kept in memory; images lie in a folder.

    Args:
        path: The annotation.
        image_root: Folder that image paths are relative to.
        name: For messages and metrics.
        repeat: How often the source is seen per epoch.
        max_tiles: Most tiles per image here, or None for the stage's.
    """

    def __init__(
        self,
        path: Path,
        image_root: Path,
        *,
        name: str = "",
        repeat: float = 1.0,
        max_tiles: int | None = None,
    ):
        self.path, self.image_root = Path(path), Path(image_root)
        self.name, self.repeat, self.max_tiles = name or self.path.stem, repeat, max_tiles
        if not self.path.is_file():
            raise SampleError(f"{self.path}: no such annotation file (source {self.name!r})")
        if not 0 < repeat < math.inf:
            raise SampleError(
                f"source {self.name!r}: repeat_time={repeat}; expected a positive number"
            )
        self._lines = self._index()
        if not len(self._lines):
            raise SampleError(f"{self.path}: holds no record (source {self.name!r})")

    def _index(self) -> np.ndarray:
        """(records, 3) int64: place to name in messages, first byte and end byte of each record."""
        return _line_numbers_and_offsets(self.path)

    def __len__(self) -> int:
        return len(self._lines)

    def size(self, index: int) -> int:
        """Bytes of a record's line: a cheap stand-in for its length."""
        return int(self._lines[index, 2] - self._lines[index, 1])

    def record(self, index: int) -> Record:
        """Read one record; see `Source`."""
        number, start, end = (int(x) for x in self._lines[index])
        where = f"{self.path}:{number}"
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.read(end - start)
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SampleError(f"{where}: not JSON ({error}); fix or remove the line") from error
        return self._parsed(value, index, where)

    def fingerprint(self) -> bytes:
        """Name and digest of the annotation, images not included: 250 MB take a quarter second."""
        with self.path.open("rb") as file:
            return f"{self.path.name} ".encode() + hashlib.file_digest(file, "sha256").digest()

    def _parsed(self, value: Any, index: int, where: str) -> Record:
        def open_image(name: str) -> FileImage:
            path = self.image_root / name
            try:
                is_there = path.is_file()
            except OSError:  # a name too long to be one, such as a data URI
                is_there = False
            if not is_there:
                raise SampleError(
                    f"{where}: image {shortened(str(path))} does not exist; check the "
                    "source's root, and give the path of a file",
                    reason="image missing",
                )
            return FileImage(path)

        return parse_record(value, index, where, open_image, self.max_tiles)


class JsonArraySource(JsonlSource):
    """One JSON array of records, as LLaVA ships its instruction data; read whole."""

    def __init__(self, path: Path, image_root: Path, **options: Any):
        self._records = _read_json(Path(path))
        if not isinstance(self._records, list):
            raise SampleError(f"{path}: a JSON {type(self._records).__name__}; expected an array")
        super().__init__(path, image_root, **options)

    def _index(self) -> np.ndarray:
        sizes = [len(json.dumps(record)) for record in self._records]
        return np.array([[i, 0, size] for i, size in enumerate(sizes)], np.int64).reshape(-1, 3)

    def record(self, index: int) -> Record:
        return self._parsed(self._records[index], index, f"{self.path}[{index}]")


SOURCES: dict[str, Callable[..., Source]] = {".jsonl": JsonlSource, ".json": JsonArraySource}
"""What reads an annotation, by its suffix; called as `JsonlSource` is, which reads all others."""


def read_meta(path: Path) -> list[Source]:
    """The sources that a meta file names.

    Args:
        path: JSON file `{name: {root, annotation, repeat_time, max_dynamic_patch, ...}}`; paths in
            it are relative to its folder.

    Raises:
        SampleError: Not such a file, or a source of it is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise SampleError(f"{path}: no such meta file; expected JSON naming the sources")
    meta = _read_json(path)
    if not isinstance(meta, dict) or not meta:
        raise SampleError(f"{path}: expected a JSON object with one entry per source")
    return [_source_of(path, name, entry) for name, entry in meta.items()]


def _source_of(meta: Path, name: str, entry: Any) -> Source:
    """The source of one entry of a meta file."""
    here = f"{meta}: source {name!r}"
    if not isinstance(entry, dict):
        raise SampleError(f"{here}: {entry!r}; expected an object with root and annotation")
    for field in ("root", "annotation"):
        if not isinstance(entry.get(field), str):
            raise SampleError(f"{here}: {field}={entry.get(field)!r}; expected a path")
    repeat, max_tiles = entry.get("repeat_time", 1), entry.get("max_dynamic_patch")
    if isinstance(repeat, bool) or not isinstance(repeat, int | float):
        raise SampleError(f"{here}: repeat_time={repeat!r}; expected a positive number")
    is_count = isinstance(max_tiles, int) and not isinstance(max_tiles, bool) and max_tiles >= 1
    if max_tiles is not None and not is_count:
        raise SampleError(f"{here}: max_dynamic_patch={max_tiles!r}; expected an integer >= 1")
    base = meta.parent
    annotation = base / entry["annotation"]
    open_source = SOURCES.get(annotation.suffix, JsonlSource)
    return open_source(
        annotation, base / entry["root"], name=name, repeat=float(repeat), max_tiles=max_tiles
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise SampleError(f"{path}: not a readable JSON file ({error})") from error


def _line_numbers_and_offsets(path: Path) -> np.ndarray:
    """(records, 3) int64: line number (from 1), first byte and end byte of every non-blank line."""
    newlines, size = [], 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            newlines.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size)
            size += len(chunk)
        ends = np.concatenate([*newlines, np.array([size])]).astype(np.int64)
        starts = np.concatenate(([0], ends[:-1] + 1))
        lines = np.stack((np.arange(1, len(ends) + 1), starts, ends), axis=1)
        is_record = ends > starts
        for row in np.flatnonzero(is_record & (ends - starts <= _LONGEST_BLANK)):
            file.seek(starts[row])
            is_record[row] = bool(file.read(int(ends[row] - starts[row])).strip())
    return lines[is_record]
