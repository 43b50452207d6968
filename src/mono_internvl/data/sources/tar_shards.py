"""Tar shards in the WebDataset form, as img2dataset writes them: read in place, never unpacked.

A sample is images with a `.txt`, its caption, or a `.json`, whose words are understood by `forms`.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from mono_internvl.data.forms import raw_record
from mono_internvl.data.records import Record, parse_record
from mono_internvl.data.sources.json_files import LONGEST_LINE, parse_json
from mono_internvl.data.sources.source import Measure, SourceOptions
from mono_internvl.data.sources.tar_index import (
    IMAGE,
    JSON,
    TEXT,
    IndexHead,
    TarIndex,
    cached_index,
    read_head,
    scan,
)
from mono_internvl.errors import ImageError, SampleError
from mono_internvl.processing.image_files import MAX_BYTES

_HEADER = 512
_TOKENS_OF_IMAGE = 512  # what an image whose size is not known counts for in batches of like sizes
_PIXELS_OF_TOKEN = 28 * 28


@dataclass(frozen=True)
class TarImage:
    """An image in a shard.

    Attributes:
        tar: The shard.
        offset: First byte of the image.
        size: Bytes of it.
        name: Of its sample.
    """

    tar: Path
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"

    def read(self, size: int = -1, /) -> bytes:
        """The image; see `ImageRef`."""
        wanted = min(self.size if size < 0 else min(size, self.size), MAX_BYTES + 1)
        try:
            data = pread(self.tar, wanted, self.offset)
        except OSError as error:
            raise ImageError(f"image {self}: not readable ({error})") from error
        if len(data) < wanted:
            raise ImageError(f"image {self}: {len(data)} of {wanted} bytes; the shard is cut short")
        return data

    def version(self) -> tuple[int, ...]:
        """Size and time of change of the shard, and the place in it; see `ImageRef`."""
        status = self.tar.stat()
        return status.st_size, status.st_mtime_ns, self.offset


@dataclass(frozen=True)
class _Shard:
    """A shard by its index: kept in memory where no file keeps it."""

    tar: Path
    head: IndexHead
    own: TarIndex | None

    @property
    def index(self) -> TarIndex:
        return self.own if self.own is not None else cached_index(self.tar, self.head.digest)


class TarSource:
    """Samples of tar shards; one that is listed twice is read twice.

    Args:
        tars: The shards in order.
        root: Folder; of no meaning, images lie in the shards.
        **options: Fields of `SourceOptions`.
    """

    def __init__(self, tars: Path | Sequence[Path], root: Path | None = None, **options: Any):
        listed = [Path(tars)] if isinstance(tars, str | Path) else [Path(tar) for tar in tars]
        self.options = SourceOptions(**options).named(listed[0].stem)
        self.name, self.repeat = self.options.name, self.options.repeat
        opened: dict[Path, _Shard] = {}
        for tar in listed:
            if tar not in opened:
                opened[tar] = _open(tar)
        self.shards = [opened[tar] for tar in listed]
        self._ends = list(accumulate(shard.head.records for shard in self.shards))
        if not len(self):
            raise SampleError(f"{listed[0]}: holds no record (source {self.name!r})")

    @classmethod
    def of_index(cls, tar: Path, index: TarIndex, options: SourceOptions | None) -> TarSource:
        """One shard by an index that is not kept yet, or is about to be replaced."""
        source = cls.__new__(cls)
        source.options = (options or SourceOptions()).named(tar.stem)
        source.name, source.repeat = source.options.name, source.options.repeat
        source.shards = [_Shard(tar, IndexHead(len(index), index.digest()), index)]
        source._ends = [len(index)]
        return source

    def __len__(self) -> int:
        return self._ends[-1]

    def size(self, index: int) -> int:
        """Bytes of words, and visual tokens of images as far as they are known."""
        shard, sample = self._locate(index)
        found, size = shard.index, 0
        for member in found.members(sample):
            if found.kind[member] != IMAGE:
                size += int(found.size[member])
            elif found.width[member]:
                pixels = int(found.width[member]) * int(found.height[member])
                size += pixels // _PIXELS_OF_TOKEN
            else:
                size += _TOKENS_OF_IMAGE
        return size

    def measure(self, index: int, tokenized_by: str) -> Measure | None:
        """See `MeasuredSource`."""
        shard, sample = self._locate(index)
        found = shard.index
        if found.tokenized_by != self.counted_by(tokenized_by) or found.text_tokens[sample] < 0:
            return None
        images = [m for m in found.members(sample) if found.kind[m] == IMAGE]
        sizes = tuple((int(found.width[m]), int(found.height[m])) for m in images)
        if any(width == 0 for width, _ in sizes):
            return None
        return Measure(int(found.text_tokens[sample]), sizes, self.options.max_tiles)

    def counted_by(self, tokenized_by: str) -> str:
        """Digest of what counts the tokens of these shards: what captions answer has a part."""
        return f"{tokenized_by}-{zlib.crc32(self.options.prompt.encode()):08x}"

    def record(self, index: int) -> Record:
        """Read one record; see `Source`."""
        shard, sample = self._locate(index)
        found, tar = shard.index, shard.tar
        members = found.members(sample)
        if not members:
            raise SampleError(
                f"{tar}: sample {sample} has no image, .txt or .json; or the shard is damaged from "
                "there on: fetch or write it again",
                reason="shard damaged",
            )
        key = sample_key(tar, found, members[0])
        words: dict[str, Any] = {}
        where = f"{tar}:{key}"
        # A caption in a .txt counts more than what a .json says of it.
        for member in sorted(members, key=lambda m: found.kind[m] == TEXT):
            kind = found.kind[member]
            if kind == IMAGE:
                continue
            if found.size[member] > LONGEST_LINE:
                raise SampleError(
                    f"{where}: words of {int(found.size[member]):,} bytes; at most "
                    f"{LONGEST_LINE:,} are read",
                    reason="line too long",
                )
            content = _read_member(tar, found, member, with_content=True)[1]
            words |= _words(content, int(kind), where)
        images = [
            TarImage(tar, int(found.offset[m]), int(found.size[m]), key)
            for m in members
            if found.kind[m] == IMAGE
        ]
        fields = {"key": key, **words}
        return parse_record(
            raw_record(fields, len(images), self.options.prompt, where),
            index,
            where,
            lambda name: images[int(name)],
            self.options.max_tiles,
            augments=self.options.augments,
        )

    def fingerprint(self) -> bytes:
        """Digest of all indexes in order, what captions answer included; contents are not read."""
        sha = hashlib.sha256(self.options.prompt.encode())
        for shard in self.shards:
            sha.update(shard.head.digest.encode())
        return sha.digest()

    def _locate(self, index: int) -> tuple[_Shard, int]:
        place = bisect_right(self._ends, index)
        return self.shards[place], index - (self._ends[place - 1] if place else 0)


def pread(file: Path, size: int, offset: int) -> bytes:
    """Bytes of a file from an offset on; fewer where it ends."""
    with file.open("rb", buffering=0) as opened:
        if hasattr(os, "pread"):
            return os.pread(opened.fileno(), size, offset)
        opened.seek(offset)
        return opened.read(size)


def _open(tar: Path) -> _Shard:
    head = read_head(tar)
    if head is not None:
        return _Shard(tar, head, None)
    index = scan(tar)
    return _Shard(tar, IndexHead(len(index), index.digest()), index)


def sample_key(tar: Path, index: TarIndex, member: int) -> str:
    """What the sample of a member is called.

    Raises:
        SampleError: The shard is not the one that the index was made of.
    """
    return _read_member(tar, index, member, with_content=False)[0]


def _read_member(
    tar: Path, index: TarIndex, member: int, *, with_content: bool
) -> tuple[str, bytes]:
    """Key and content of a member, its header held against the index.

    Raises:
        SampleError: The shard is not the one that the index was made of.
    """
    offset, size = int(index.offset[member]), int(index.size[member])
    wanted = _HEADER + (size if with_content else 0)
    try:
        data = pread(tar, wanted, offset - _HEADER)
    except OSError as error:
        raise SampleError(f"{tar}: not readable ({error})", reason="shard damaged") from error
    if len(data) < wanted or not _is_header(data[:_HEADER], size):
        raise SampleError(
            f"{tar}: no member begins at byte {offset - _HEADER}; the shard was changed after it "
            "was indexed, run `mono-internvl data prepare` again",
            reason="shard damaged",
        )
    name = data[:100].split(b"\0", 1)[0].decode("utf-8", "replace")
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}", data[_HEADER:]


def _is_header(block: bytes, size: int) -> bool:
    """Whether a block heads a member of so many bytes."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size == size
    except tarfile.TarError:
        return False


def _words(content: bytes, kind: int, where: str) -> dict[str, Any]:
    """Fields of a member; the caption of a `.txt` beside what a `.json` says of the image."""
    if kind == TEXT:
        try:
            return {"caption": content.decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            raise SampleError(f"{where}: not UTF-8 ({error})", reason="not UTF-8") from error
    assert kind == JSON
    value = parse_json(content, where)
    if not isinstance(value, dict):
        raise SampleError(f"{where}: a JSON {type(value).__name__}; expected an object")
    return value
