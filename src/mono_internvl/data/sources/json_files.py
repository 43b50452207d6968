"""Conversations in JSON: a line or an array's element is a record, its images lie in a folder.

Source: the dataset description of OpenGVLab/Mono-InternVL at 5b17ab4 and LLaVA's instruction files.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from mono_internvl.data.records import Record, parse_record
from mono_internvl.data.sources.source import SourceOptions, file_image
from mono_internvl.errors import SampleError
from mono_internvl.processing.video import frames_of

LONGEST_LINE = 8 << 20
"""Bytes; a longer line is no record but a mistake, and is not parsed."""
_CHUNK_BYTES = 1 << 24
_LONGEST_BLANK = 32  # a line of so many bytes may be nothing but white space


class JsonlSource:
    """The lines of a JSONL file: only their offsets are kept in memory; images lie in a folder.

    Args:
        path: The annotation.
        image_root: Folder that image paths are relative to.
        **options: Fields of `SourceOptions`.
    """

    def __init__(self, path: Path, image_root: Path, **options: Any):
        self.path, self.image_root = Path(path), Path(image_root)
        self.options = SourceOptions(**options).named(self.path.stem)
        self.name, self.repeat = self.options.name, self.options.repeat
        self.max_tiles = self.options.max_tiles
        if not self.path.is_file():
            raise SampleError(f"{self.path}: no such annotation file (source {self.name!r})")
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
        if end - start > LONGEST_LINE:
            raise SampleError(
                f"{where}: a line of {end - start:,} bytes; a record has at most {LONGEST_LINE:,}, "
                "images are named and not written into it",
                reason="line too long",
            )
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.read(end - start)
        return self._parsed(parse_json(line, where), index, where)

    def fingerprint(self) -> bytes:
        """Name and digest of the annotation, images not included: 250 MB take a quarter second."""
        with self.path.open("rb") as file:
            return f"{self.path.name} ".encode() + hashlib.file_digest(file, "sha256").digest()

    def _parsed(self, value: Any, index: int, where: str) -> Record:
        return parse_record(
            value,
            index,
            where,
            lambda name: file_image(self.image_root, name, where),
            self.max_tiles,
            augments=self.options.augments,
            open_video=lambda name, sampling: frames_of(self.image_root / name, sampling),
        )


class JsonArraySource(JsonlSource):
    """One JSON array of records, as LLaVA ships its instruction data; read whole."""

    def __init__(self, path: Path, image_root: Path, **options: Any):
        self._records = read_json_file(Path(path))
        if not isinstance(self._records, list):
            raise SampleError(f"{path}: a JSON {type(self._records).__name__}; expected an array")
        super().__init__(path, image_root, **options)

    def _index(self) -> np.ndarray:
        sizes = [len(json.dumps(record)) for record in self._records]
        return np.array([[i, 0, size] for i, size in enumerate(sizes)], np.int64).reshape(-1, 3)

    def record(self, index: int) -> Record:
        return self._parsed(self._records[index], index, f"{self.path}[{index}]")


def parse_json(data: bytes, where: str) -> Any:
    """The value of a stored record.

    Raises:
        SampleError: It is not UTF-8, or not JSON.
    """
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise SampleError(
            f"{where}: not UTF-8 ({error}); fix or remove the record", reason="not UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SampleError(
            f"{where}: not JSON ({error}); fix or remove the line", reason="not JSON"
        ) from error


def read_json_file(path: Path) -> Any:
    """A whole JSON file.

    Raises:
        SampleError: It cannot be read.
    """
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
