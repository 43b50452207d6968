"""Where records come from: JSONL conversations with an image folder, in the InternVL or LLaVA form.

A meta file names the sources:

    {"captions": {"root": "images/", "annotation": "captions.jsonl", "repeat_time": 1}}

Paths in it are relative to the meta file. An annotation is JSON lines, or one JSON array as LLaVA ships it.

Source: the dataset description of OpenGVLab/Mono-InternVL at 5b17ab4 and LLaVA's instruction files.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mono_internvl.errors import SampleError


@dataclass(frozen=True)
class Record:
    """One raw record and where it stands.

    Attributes:
        value: The parsed JSON object.
        where: `file:line` for messages.
    """

    value: dict[str, Any]
    where: str


class JsonlSource:
    """Random access to the lines of a JSONL file: only their offsets are kept in memory.

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
        if not 0 < repeat:
            raise SampleError(f"source {self.name!r}: repeat_time={repeat}; expected a positive number")
        self._lines = _line_numbers_and_offsets(self.path)
        if not len(self._lines):
            raise SampleError(f"{self.path}: holds no record (source {self.name!r})")

    def __len__(self) -> int:
        return len(self._lines)

    def size(self, index: int) -> int:
        """Bytes of a record's line: a cheap stand-in for its length."""
        return int(self._lines[index, 2] - self._lines[index, 1])

    def record(self, index: int) -> Record:
        """Parse one record.

        Raises:
            SampleError: The line is not a JSON object.
        """
        number, start, end = (int(x) for x in self._lines[index])
        where = f"{self.path}:{number}"
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.read(end - start)
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise SampleError(f"{where}: not JSON ({error}); fix or remove the line") from error
        if not isinstance(value, dict):
            raise SampleError(f"{where}: a JSON {type(value).__name__}; expected an object")
        return Record(value, where)


class JsonArraySource(JsonlSource):
    """One JSON array of records, as LLaVA ships its instruction data; read whole."""

    def __init__(self, path: Path, image_root: Path, **options: Any):
        try:
            self._records = json.loads(Path(path).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise SampleError(f"{path}: not a readable JSON file ({error})") from error
        if not isinstance(self._records, list):
            raise SampleError(f"{path}: a JSON {type(self._records).__name__}; expected an array")
        super().__init__(path, image_root, **options)
        sizes = [len(json.dumps(record)) for record in self._records]
        self._lines = np.array([[i, 0, size] for i, size in enumerate(sizes)], np.int64).reshape(-1, 3)
        if not sizes:
            raise SampleError(f"{path}: holds no record (source {self.name!r})")

    def record(self, index: int) -> Record:
        value, where = self._records[index], f"{self.path}[{index}]"
        if not isinstance(value, dict):
            raise SampleError(f"{where}: a JSON {type(value).__name__}; expected an object")
        return Record(value, where)


def read_meta(path: Path, base: Path | None = None) -> list[JsonlSource]:
    """The sources that a meta file names.

    Args:
        path: JSON file `{name: {root, annotation, repeat_time, max_dynamic_patch, ...}}`.
        base: Folder its paths are relative to; the meta file's own unless given.

    Raises:
        SampleError: Not such a file, or a source of it is missing.
    """
    path = Path(path)
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise SampleError(f"{path}: no such meta file; expected JSON naming the sources") from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise SampleError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(meta, dict) or not meta:
        raise SampleError(f"{path}: expected a JSON object with one entry per source")
    base = base or path.parent
    sources = []
    for name, entry in meta.items():
        missing = [k for k in ("root", "annotation") if k not in entry] if isinstance(entry, dict) else []
        if not isinstance(entry, dict) or missing:
            raise SampleError(f"{path}: source {name!r} lacks {', '.join(missing) or 'its fields'}")
        annotation = base / entry["annotation"]
        kind = JsonArraySource if annotation.suffix == ".json" else JsonlSource
        sources.append(
            kind(
                annotation,
                base / entry["root"],
                name=name,
                repeat=float(entry.get("repeat_time", 1)),
                max_tiles=entry.get("max_dynamic_patch"),
            )
        )
    return sources


def _line_numbers_and_offsets(path: Path) -> np.ndarray:
    """(records, 3) int64: line number (from 1), first byte and end byte of every non-blank line."""
    if path.stat().st_size == 0:
        return np.zeros((0, 3), np.int64)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        newlines = np.flatnonzero(np.frombuffer(view, np.uint8) == ord("\n"))
        ends = newlines if len(newlines) and newlines[-1] == len(view) - 1 else [*newlines, len(view)]
        ends = np.asarray(ends, np.int64)
    starts = np.concatenate(([0], ends[:-1] + 1))
    numbers = np.arange(1, len(ends) + 1)
    lines = np.stack((numbers, starts, ends), axis=1)
    return lines[lines[:, 2] - lines[:, 1] > 1]


def total_size(sources: Sequence[JsonlSource]) -> int:
    """Records of all sources together, repeats not counted."""
    return sum(len(source) for source in sources)
