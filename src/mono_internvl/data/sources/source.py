"""What a source of records is, whatever stores it."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from mono_internvl.data.records import CAPTION_PROMPT, Record, shortened
from mono_internvl.errors import SampleError
from mono_internvl.processing.image_files import read_file


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
class Measure:
    """The length of a record, known without reading it.

    Attributes:
        text_tokens: Tokens of the whole sample but for what stands between `<img>` and `</img>`.
        image_sizes: (width, height) of every image in order, px, upright.
        max_tiles: As the record has it.
    """

    text_tokens: int
    image_sizes: tuple[tuple[int, int], ...]
    max_tiles: int | None = None


@runtime_checkable
class MeasuredSource(Protocol):
    """A source that may know its records' lengths, as `mono-internvl data prepare` stores them."""

    def measure(self, index: int, tokenized_by: str) -> Measure | None:
        """The length of a record, or None where it is not stored or was counted otherwise.

        Args:
            index: Of the record.
            tokenized_by: Digest of what turns texts into tokens now.
        """
        ...


@dataclass(frozen=True)
class SourceOptions:
    """What a meta file says of a source besides where it is.

    Attributes:
        name: For messages and metrics.
        repeat: How often the source is seen per epoch.
        max_tiles: Most tiles per image here, or None for the stage's.
        augments: Whether its images are augmented, as `data_augment` asks for.
        prompt: What a caption without a question answers.
    """

    name: str = ""
    repeat: float = 1.0
    max_tiles: int | None = None
    augments: bool = False
    prompt: str = CAPTION_PROMPT

    def __post_init__(self) -> None:
        if not 0 < self.repeat < math.inf:
            raise SampleError(
                f"source {self.name!r}: repeat_time={self.repeat}; expected a positive number"
            )

    def named(self, name: str) -> SourceOptions:
        """The same, with a name where there is none."""
        return self if self.name else replace(self, name=name)


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


@dataclass(frozen=True)
class BytesImage:
    """An encoded image in memory.

    Attributes:
        data: The encoded image.
        name: In messages.
    """

    data: bytes
    name: str

    def __str__(self) -> str:
        return self.name

    def read(self, size: int = -1, /) -> bytes:
        """The image; see `ImageRef`."""
        return self.data if size < 0 else self.data[:size]

    def version(self) -> tuple[int, ...]:
        """Size and a hash; see `ImageRef`."""
        return len(self.data), zlib.crc32(self.data)


def file_image(root: Path, name: str, where: str) -> FileImage:
    """The image file of a record.

    Args:
        root: Folder that its name is relative to.
        name: As the record has it.
        where: The record's place, for messages.

    Raises:
        SampleError: There is none.
    """
    path = root / name
    try:
        is_there = path.is_file()
    except (OSError, ValueError):  # too long for a name, such as a data URI, or a null byte in it
        is_there = False
    if not is_there:
        raise SampleError(
            f"{where}: image {shortened(str(path))} does not exist; check the source's root, and "
            "give the path of a file",
            reason="image missing",
        )
    return FileImage(path)
