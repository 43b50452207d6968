"""The index of a tar shard: where each sample's members lie, so that one is read with `pread`.

An index is kept beside its shard (`00000.tar.index`), in the safetensors format; where it is not
kept, the headers of the shard are read once when it is opened. Consecutive members whose names
agree up to the first dot of their last part are one sample, as in the WebDataset form.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from mono_internvl.errors import SampleError

SUFFIX = ".index"
TEXT, JSON, IMAGE = 0, 1, 2
_KINDS = {
    "txt": TEXT,
    "json": JSON,
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"), IMAGE),
}
_FORM = "mono-internvl tar index 1"
_BLOCK = 512


@dataclass(frozen=True)
class TarIndex:
    """Where the samples of a shard are. N samples, M members.

    Attributes:
        first: (N + 1,) int64, number of each sample's first member; a sample without a member has
            none of a known kind, or is what a damaged end of the shard has left.
        offset: (M,) int64, first byte of a member's content.
        size: (M,) int64, bytes of it.
        kind: (M,) uint8, `TEXT`, `JSON` or `IMAGE`.
        width: (M,) int32, of an upright image, px; 0 unknown.
        height: (M,) int32, likewise.
        text_tokens: (N,) int32, see `Measure`; -1 unknown.
        tar_bytes: Of the shard.
        tokenized_by: Digest of what counted the tokens; "" if nothing did.
    """

    first: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    kind: np.ndarray
    width: np.ndarray
    height: np.ndarray
    text_tokens: np.ndarray
    tar_bytes: int
    tokenized_by: str = ""

    def __len__(self) -> int:
        return len(self.first) - 1

    def members(self, sample: int) -> range:
        """Numbers of a sample's members."""
        return range(int(self.first[sample]), int(self.first[sample + 1]))

    def tensors(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        names = ("first", "offset", "size", "kind", "width", "height", "text_tokens")
        return {name: getattr(self, name) for name in names}

    def digest(self) -> str:
        """What differs where another member lies elsewhere or is longer."""
        sha = hashlib.sha256(str(self.tar_bytes).encode())
        for array in (self.first, self.offset, self.size, self.kind):
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()

    def with_sizes(
        self,
        image_sizes: Sequence[tuple[int, int]],
        text_tokens: Sequence[int],
        tokenized_by: str,
    ) -> TarIndex:
        """The same index with what makes up the samples' lengths.

        Args:
            image_sizes: (width, height) of all members; (0, 0) of those that are no readable image.
            text_tokens: Of all samples.
            tokenized_by: Digest of what counted them.
        """
        sizes = np.array(image_sizes, np.int32).reshape(-1, 2)
        return replace(
            self,
            width=np.ascontiguousarray(sizes[:, 0]),
            height=np.ascontiguousarray(sizes[:, 1]),
            text_tokens=np.array(text_tokens, np.int32),
            tokenized_by=tokenized_by,
        )


@dataclass(frozen=True)
class IndexHead:
    """What is read of an index when its shard is opened.

    Attributes:
        records: Samples.
        digest: See `TarIndex.digest`.
        tokenized_by: See `TarIndex`.
        bad: Source, reason and message of the records that were found bad when it was made.
    """

    records: int
    digest: str
    tokenized_by: str = ""
    bad: tuple[tuple[str, str, str], ...] = ()


def index_file(tar: Path) -> Path:
    """Where the index of a shard is kept."""
    return tar.with_name(tar.name + SUFFIX)


def scan(tar: Path) -> TarIndex:
    """Read the headers of a shard.

    Raises:
        SampleError: It is no plain tar file at all.
    """
    first, offset, size, kind = [0], [], [], []
    previous: str | None = None
    for key, member in _members(tar):
        if key != previous:
            first.append(first[-1])
            previous = key
        if member is not None:
            offset.append(member[0])
            size.append(member[1])
            kind.append(member[2])
            first[-1] += 1
    count = len(offset)
    return TarIndex(
        first=np.array(first, np.int64),
        offset=np.array(offset, np.int64),
        size=np.array(size, np.int64),
        kind=np.array(kind, np.uint8),
        width=np.zeros(count, np.int32),
        height=np.zeros(count, np.int32),
        text_tokens=np.full(len(first) - 1, -1, np.int32),
        tar_bytes=tar.stat().st_size,
    )


def _members(tar: Path) -> Iterator[tuple[str, tuple[int, int, int] | None]]:
    """Key and (offset, size, kind) of every file; None for a damaged one or of another kind."""
    try:
        file = tarfile.open(tar, "r:")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        raise SampleError(f"{tar}: no such shard") from None
    except (OSError, tarfile.TarError) as error:
        raise SampleError(
            f"{tar}: not a plain tar file ({error}); a compressed one has to be unpacked first"
        ) from error
    total = tar.stat().st_size
    with file:
        while True:
            try:
                found = file.next()
            except (tarfile.TarError, OSError, ValueError):
                yield "\0damaged", None
                return
            if found is None:
                # Nothing but blocks of zeros ends a whole shard; tarfile takes other ends, too.
                if file.offset < total and not _is_blank(tar, file.offset):
                    yield "\0damaged", None
                return
            file.members = []  # type: ignore[attr-defined]  # it would keep them all
            if not found.isreg():
                continue
            folder, _, base = found.name.rpartition("/")
            stem, _, extension = base.partition(".")
            kind = _KINDS.get(extension.rpartition(".")[2].lower())
            is_whole = found.offset_data + found.size <= total
            if not is_whole:
                yield "\0damaged", None
                return
            member = None if kind is None else (found.offset_data, found.size, kind)
            yield f"{folder}/{stem}", member


def _is_blank(tar: Path, offset: int) -> bool:
    with tar.open("rb") as file:
        file.seek(offset)
        return not any(file.read(2 * _BLOCK))


def write_index(tar: Path, index: TarIndex, bad: Sequence[tuple[str, str, str]] = ()) -> None:
    """Keep the index of a shard beside it, whole or not at all.

    Args:
        tar: The shard.
        index: Of it.
        bad: See `IndexHead`.
    """
    file = index_file(tar)
    partial = file.with_name(f".{file.name}.partial")
    about = {
        "form": _FORM,
        "records": str(len(index)),
        "digest": index.digest(),
        "tar_bytes": str(index.tar_bytes),
        "tokenized_by": index.tokenized_by,
        "bad": json.dumps(list(bad)),
    }
    save_file(index.tensors(), partial, metadata=about)
    partial.replace(file)


def read_head(tar: Path) -> IndexHead | None:
    """What the index beside a shard says of it; None if none is kept.

    Raises:
        SampleError: It is damaged, or was made of another file.
    """
    about = _about(tar)
    if about is None:
        return None
    bad = tuple((str(s), str(r), str(m)) for s, r, m in json.loads(about["bad"]))
    return IndexHead(int(about["records"]), about["digest"], about["tokenized_by"], bad)


def read_index(tar: Path) -> TarIndex:
    """The index beside a shard.

    Raises:
        SampleError: As by `read_head`.
    """
    about = _about(tar)
    if about is None:
        raise SampleError(f"{index_file(tar)}: is gone; {_AGAIN}")
    try:
        arrays = load_file(index_file(tar))
        return TarIndex(
            **arrays, tar_bytes=int(about["tar_bytes"]), tokenized_by=about["tokenized_by"]
        )
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise SampleError(f"{index_file(tar)}: not readable ({error}); {_AGAIN}") from error


_AGAIN = "delete it, or run `mono-internvl data prepare` again"


def _about(tar: Path) -> dict[str, Any] | None:
    file = index_file(tar)
    if not file.is_file():
        return None
    try:
        with safe_open(file, "np") as opened:
            about = dict(opened.metadata() or {})
        if about.get("form") != _FORM or not {"records", "digest", "tokenized_by", "bad"} <= set(
            about
        ):
            raise ValueError(f"form={about.get('form')!r}, expected {_FORM!r}")
        size = tar.stat().st_size
    except (OSError, SafetensorError, ValueError) as error:
        raise SampleError(f"{file}: not readable ({error}); {_AGAIN}") from error
    if about.get("tar_bytes") != str(size):
        raise SampleError(
            f"{file}: made of a shard of {about.get('tar_bytes')} bytes, it has {size}; {_AGAIN}"
        )
    return about


@functools.lru_cache(maxsize=256)
def cached_index(tar: Path, digest: str) -> TarIndex:
    """The index beside a shard; those used last stay in memory.

    Args:
        tar: The shard.
        digest: That its index had when it was opened; another one is not taken from memory.
    """
    return read_index(tar)
